//! `key`: who can open the repository.

use super::moment;
use crate::arguments::{KeyAddArguments, KeyChangeArguments, KeyCommand, KeyRecoveryArguments, KeyRemoveArguments};
use crate::shell::exit::{Exit, Refusal};
use crate::shell::output::{Format, Table};
use crate::shell::repository::RepositoryArguments;
use crate::shell::secrets::NEW_PASSPHRASE;
use crate::{Failure, Outcome};
use serde_json::{Value, json};
use std::io::Write as _;
use std::path::Path;
use xenvault_store::{KdfParams, KeyAccess, KeySlotListing, NewKey, RecoveryKey, Repository, Secret, SlotKind};

pub async fn run(command: KeyCommand, format: Format) -> Outcome {
    match command {
        KeyCommand::List(repository) => list(&open(&repository).await?, format).await,
        KeyCommand::Add(arguments) => add(&arguments, format).await,
        KeyCommand::Recovery(arguments) => recovery(&arguments, format).await,
        KeyCommand::Change(arguments) => change(&arguments, format).await,
        KeyCommand::Remove(arguments) => remove(&arguments, format).await,
    }
}

async fn open(arguments: &RepositoryArguments) -> Result<Repository, Failure> {
    let passphrase = arguments.passphrase()?;
    Ok(arguments.open_with(&passphrase).await?)
}

async fn list(repository: &Repository, format: Format) -> Outcome {
    let slots = repository.key_slots().await?;
    let mut table = Table::new(&["slot", "opens with", "gives", "made", "label", ""]);
    let mut damaged = String::new();
    for slot in &slots {
        match &slot.slot {
            Ok(summary) => table.row([
                slot.name.clone(),
                kind(summary.kind).to_owned(),
                access(summary.access).to_owned(),
                moment(summary.created_unix_ms),
                summary.label.clone(),
                if slot.in_use { "in use now" } else { "" }.to_owned(),
            ]),
            Err(error) => damaged.push_str(&format!("DAMAGED {}: {error}\n", slot.name)),
        }
    }
    let text = table.to_string() + &damaged;
    let told = format.result(&text, json!({ "slots": slots.iter().map(record).collect::<Vec<_>>() }));
    Ok(if damaged.is_empty() { told } else { Exit::Damaged })
}

fn kind(kind: SlotKind) -> &'static str {
    match kind {
        SlotKind::Passphrase(_) => "passphrase",
        SlotKind::Recovery => "recovery key",
        _ => "something else",
    }
}

fn access(access: KeyAccess) -> &'static str {
    match access {
        KeyAccess::Full => "everything",
        KeyAccess::WriteOnly => "writing",
        _ => "something else",
    }
}

fn record(slot: &KeySlotListing) -> Value {
    match &slot.slot {
        Ok(summary) => json!({
            "slot": slot.name,
            "kind": kind(summary.kind),
            "access": access(summary.access),
            "created_unix_ms": summary.created_unix_ms,
            "label": summary.label,
            "in_use": slot.in_use,
        }),
        Err(error) => json!({ "slot": slot.name, "damaged": error.to_string(), "in_use": slot.in_use }),
    }
}

async fn add(arguments: &KeyAddArguments, format: Format) -> Outcome {
    // The order in which two secrets stand on one standard input.
    let passphrase = arguments.repository.passphrase()?;
    let key = new_passphrase(arguments.new_passphrase_file.as_deref())?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let gives = if arguments.write_only { KeyAccess::WriteOnly } else { KeyAccess::Full };
    let slot = repository.add_key(&key, gives, &arguments.label).await?;
    let text = format!("the new passphrase opens the repository (key slot {slot}), and gives {}", access(gives));
    Ok(format.result(&text, json!({ "slot": slot, "access": access(gives) })))
}

fn new_passphrase(file: Option<&Path>) -> Result<NewKey, Failure> {
    let passphrase = NEW_PASSPHRASE.read(file)?;
    Ok(NewKey::Passphrase(Secret::new(passphrase.as_str()), KdfParams::default()))
}

async fn recovery(arguments: &KeyRecoveryArguments, format: Format) -> Outcome {
    let repository = open(&arguments.repository).await?;
    let key = RecoveryKey::random()?;
    let text = key.to_text();
    // First the file: a slot whose key nobody has is of no use.
    if let Some(file) = &arguments.to {
        write_new(file, &text).map_err(|error| {
            let text = format!("the recovery key can not be written to {}: {error}", file.display());
            Refusal { exit: Exit::Usage, text }
        })?;
    }
    let added = repository.add_key(&NewKey::Recovery(key), KeyAccess::Full, &arguments.label).await;
    if let (Err(_), Some(file)) = (&added, &arguments.to) {
        // It may open a slot that was written all the same; who asked for it was told that it failed.
        let _ = std::fs::remove_file(file);
    }
    let (slot, id) = (added?, repository.id());
    let advice = "Keep it apart from the repository and from the passphrase, on paper or in a safe. Give it in the place of the passphrase.";
    Ok(match &arguments.to {
        Some(file) => format.result(
            &format!("wrote the recovery key of repository {id} (key slot {slot}) to {}\n{advice}", file.display()),
            json!({ "slot": slot, "file": file }),
        ),
        None => format.result(
            &format!("recovery key of repository {id} (key slot {slot}), shown only now:\n\n    {}\n\n{advice}", *text),
            json!({ "slot": slot, "recovery_key": *text }),
        ),
    })
}

/// Writes a file that only its owner can read, and that was not there before.
fn write_new(path: &Path, text: &str) -> std::io::Result<()> {
    let mut options = std::fs::File::options();
    options.write(true).create_new(true);
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path)?;
    file.write_all(format!("{text}\n").as_bytes())?;
    file.sync_all()
}

async fn change(arguments: &KeyChangeArguments, format: Format) -> Outcome {
    let passphrase = arguments.repository.passphrase()?;
    let key = new_passphrase(arguments.new_passphrase_file.as_deref())?;
    let repository = arguments.repository.open_with(&passphrase).await?;
    let slots = repository.key_slots().await?;
    let ours = slots.iter().find(|slot| slot.in_use).and_then(|slot| slot.slot.as_ref().ok());
    if ours.is_some_and(|slot| slot.kind == SlotKind::Recovery) {
        let text = "the repository was opened with a recovery key, which stays as it is: give it a new passphrase with `key add`, and take the lost one away with `key remove`".to_owned();
        return Err(Refusal { exit: Exit::Prerequisite, text }.into());
    }
    let slot = repository.change_key(&key).await?;
    let text = format!(
        "the new passphrase opens the repository (key slot {slot}); the old one does not any more\nWhoever has copies of the old key slot and the old passphrase can still use them; so can a store that keeps old versions."
    );
    Ok(format.result(&text, json!({ "slot": slot })))
}

async fn remove(arguments: &KeyRemoveArguments, format: Format) -> Outcome {
    let repository = open(&arguments.repository).await?;
    let slots = repository.key_slots().await?;
    let mut going = Vec::new();
    for wanted in &arguments.slots {
        going.push(chosen(&slots, wanted)?);
    }
    let is_going = |slot: &&KeySlotListing| going.contains(&slot.name);
    let of = |slot: &KeySlotListing| match &slot.slot {
        Ok(summary) => format!("{}, {}, {}", slot.name, kind(summary.kind), label(&summary.label)),
        Err(_) => format!("{}, damaged", slot.name),
    };
    let lines = |title: &str, slots: Vec<&KeySlotListing>| -> String {
        slots.into_iter().map(|slot| format!("{title}: {}\n", of(slot))).collect()
    };
    let (go, stay): (Vec<&KeySlotListing>, Vec<&KeySlotListing>) = slots.iter().partition(is_going);
    let told = json!({
        "removed": go.iter().map(|slot| record(slot)).collect::<Vec<_>>(),
        "staying": stay.iter().map(|slot| record(slot)).collect::<Vec<_>>(),
        "dry_run": arguments.dry_run,
    });
    if arguments.dry_run {
        let text = lines("would go", go) + &lines("would stay", stay);
        return Ok(format.result(&text, told));
    }
    if !arguments.confirm {
        let text = format!(
            "nothing was removed:\n{}{}whoever has only what opens a slot that goes is locked out; if that is meant, say so with --confirm",
            lines("would go", go),
            lines("would stay", stay)
        );
        return Err(Refusal { exit: Exit::Prerequisite, text }.into());
    }
    repository.remove_keys(&going).await?;
    Ok(format.result(&(lines("removed", go) + &lines("stays", stay)), told))
}

fn label(label: &str) -> String {
    if label.is_empty() { "no label".to_owned() } else { format!("\"{label}\"") }
}

/// The name of the slot that is meant by a name or its beginning.
fn chosen(slots: &[KeySlotListing], wanted: &str) -> Result<String, Refusal> {
    if let Some(slot) = slots.iter().find(|slot| slot.name == wanted) {
        return Ok(slot.name.clone());
    }
    let fitting: Vec<&KeySlotListing> = slots.iter().filter(|slot| slot.name.starts_with(wanted)).collect();
    match fitting[..] {
        [slot] => Ok(slot.name.clone()),
        [] => {
            let text = format!("there is no key slot {wanted}: `key list` names those that there are");
            Err(Refusal { exit: Exit::NotFound, text })
        }
        _ => Err(Refusal { exit: Exit::NotFound, text: format!("several key slots begin with {wanted}") }),
    }
}
