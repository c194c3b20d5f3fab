//! `point show`: one point, and what protects it, read back from the store.

use super::{instant, show, unix_ms};
use crate::Outcome;
use crate::arguments::ShowArguments;
use crate::points::choose;
use crate::shell::exit::Exit;
use crate::shell::output::Format;
use serde_json::{Value, json};
use std::fmt::Write as _;
use xenvault_engine::points;
use xenvault_store::{Immutability, PointProtection};

/// Objects that people are shown of a list.
const SHOWN: usize = 8;

pub async fn run(arguments: &ShowArguments, format: Format) -> Outcome {
    let passphrase = arguments.repository.passphrase()?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let point = choose(&repository, &arguments.point).await?;
    let proof = repository.protection(&point).await?;
    // What protects a point does not depend on what can be read of the VM.
    let (facts, mut record, hurt) = match points::show(&repository, &point).await {
        Ok(details) => (show::text(&details), show::json(&details), false),
        Err(error) => (
            format!("point {point}\nits VM's configuration can not be shown: {error}\n"),
            json!({ "point": point.to_string(), "error": error.to_string() }),
            true,
        ),
    };
    if let Some(fields) = record.as_object_mut() {
        fields.insert("protection".to_owned(), json(&proof));
    }
    let told = format.result(&(facts + &text(&proof)), record);
    Ok(if hurt { Exit::Damaged } else { told })
}

fn text(proof: &PointProtection) -> String {
    let mut text = format!("immutability: {}\n", proof.immutability);
    // Writing to a string can not fail.
    if proof.immutability == Immutability::None {
        text.push_str("nothing keeps whoever may write to the repository from removing this point\n");
        return text;
    }
    let locked = proof.governance + proof.compliance;
    let _ = writeln!(
        text,
        "asked the store about {} object(s), {} of them packs: {} locked in mode compliance, {} in mode governance, {} sealed",
        proof.objects, proof.packs, proof.compliance, proof.governance, proof.sealed,
    );
    if let Some(until) = proof.promised_until {
        let _ = writeln!(text, "promised until {}", instant(until));
    }
    if let Some((object, until)) = proof.earliest.as_ref().filter(|_| locked > 0) {
        let _ = writeln!(text, "the first lock to end is that of {object}: {}", instant(*until));
    }
    list(&mut text, "nothing protects", &proof.unprotected);
    list(&mut text, "missing is", &proof.missing);
    text.push_str(match (proof.holds(), proof.immutability) {
        (true, _) => "the promise is kept\n",
        (false, Immutability::Broker) => "THE PROMISE IS NOT KEPT: let the broker seal what is new\n",
        (false, _) => "THE PROMISE IS NOT KEPT: run `keep` with the keeper's credential\n",
    });
    text
}

fn list(text: &mut String, what: &str, objects: &[String]) {
    for object in objects.iter().take(SHOWN) {
        let _ = writeln!(text, "{what} {object}");
    }
    if objects.len() > SHOWN {
        let _ = writeln!(text, "{what} {} object(s) more", objects.len() - SHOWN);
    }
}

fn json(proof: &PointProtection) -> Value {
    let earliest = proof.earliest.as_ref();
    json!({
        "immutability": proof.immutability.to_string(),
        "kept": proof.holds(),
        "promised_until_unix_ms": proof.promised_until.map(unix_ms),
        "asked_at_unix_ms": unix_ms(proof.asked_at),
        "objects": proof.objects,
        "packs": proof.packs,
        "compliance": proof.compliance,
        "governance": proof.governance,
        "sealed": proof.sealed,
        "earliest_object": earliest.map(|(object, _)| object),
        "earliest_unix_ms": earliest.map(|(_, until)| unix_ms(*until)),
        "unprotected": proof.unprotected,
        "missing": proof.missing,
    })
}
