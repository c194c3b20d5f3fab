//! Events: `event.from` with tokens, and the older `event.register` and `event.next`.

use std::sync::PoisonError;
use std::time::Duration;

use super::{Call, fields, session};
use crate::model::{Database, Value, schema};
use crate::rpc::{Failure, Outcome};

/// How long `event.next` waits before it looks again.
const LONGEST: Duration = Duration::from_secs(30);

/// Classes that xapi counts in `valid_ref_counts` beside those that are simulated.
const OTHER_CLASSES: &[&str] = &[
    "vdi_nbd_server_info",
    "user",
    "tunnel",
    "subject",
    "sr_stat",
    "secret",
    "role",
    "probe_result",
    "pool_update",
    "pool_patch",
    "network_sriov",
    "host_patch",
    "host_crashdump",
    "host_cpu",
    "event",
    "data_source",
    "crashdump",
    "blob",
    "auth",
    "vm_group",
    "vm_appliance",
    "vmss",
    "vmpp",
    "vlan",
    "vif_metrics",
    "vgpu_type",
    "vgpu",
    "usb_group",
    "sdn_controller",
    "repository",
    "pvs_site",
    "pvs_server",
    "pvs_proxy",
    "pvs_cache_storage",
    "pusb",
    "pif_metrics",
    "pgpu",
    "pci",
    "observer",
    "lvhd",
    "host_driver",
    "gpu_group",
    "feature",
    "driver_variant",
    "diagnostics",
    "dr_task",
    "cluster_host",
    "cluster",
    "bond",
];

/// Classes whose objects never make events.
const SILENT: &[&str] = &["session", "event"];

pub(super) async fn call(call: &Call, simple: &str) -> Option<Outcome> {
    Some(match simple {
        "from" => from(call).await,
        "register" | "unregister" => {
            let classes = call.strings(0);
            let seen = call.core.db().generation();
            let mut registrations = call.core.registrations.lock().unwrap_or_else(PoisonError::into_inner);
            let entry = registrations.entry(call.session.clone()).or_insert((Vec::new(), seen));
            entry.0.retain(|known| !classes.contains(known) && !classes.iter().any(|class| class == "*"));
            if simple == "register" {
                entry.0.extend(classes);
            }
            if entry.0.is_empty() {
                registrations.remove(&call.session);
            }
            Ok(Value::void())
        }
        "next" => next(call).await,
        "get_current_id" => Ok(Value::Int(i64::try_from(call.core.db().generation()).unwrap_or_default())),
        "inject" => {
            let mut db = call.core.db();
            let class = schema().keys().find(|name| name.eq_ignore_ascii_case(call.text(0)));
            match class.map(|class| (class, db.check(class, call.text(1)))) {
                Some((class, Ok(()))) => {
                    db.touch(class, call.text(1));
                    Ok(token(db.generation()).into())
                }
                Some((_, Err(failure))) => Err(failure),
                None => Err(Failure::handle_invalid(call.text(0), call.text(1))),
            }
        }
        _ => return None,
    })
}

fn token(generation: u64) -> String {
    format!("{generation:020},{:020}", 0)
}

fn read_token(text: &str) -> Outcome<u64> {
    if text.is_empty() {
        return Ok(0);
    }
    let (first, second) = text.split_once(',').unwrap_or((text, ""));
    match (first.parse(), second.parse::<u64>()) {
        (Ok(generation), Ok(_)) => Ok(generation),
        _ => Err(Failure::new("EVENT_FROM_TOKEN_PARSE_FAILURE", [text])),
    }
}

/// Whether a subscription (`*`, `vm`, `VM/OpaqueRef:...`) takes an object.
fn wanted(classes: &[String], class: &str, reference: &str) -> bool {
    classes.iter().any(|item| match item.split_once('/') {
        Some((name, of)) => name.eq_ignore_ascii_case(class) && (of == reference || of == "*"),
        None => item == "*" || item.eq_ignore_ascii_case(class),
    })
}

async fn from(call: &Call) -> Outcome {
    let classes = call.strings(0);
    let since = read_token(call.text(1))?;
    let wait = Duration::try_from_secs_f64(call.params.get(2).map_or(0.0, Value::as_float)).unwrap_or_default();
    let deadline = tokio::time::Instant::now() + wait.min(Duration::from_secs(3600));
    loop {
        let mut changes = call.core.changes();
        session::check(&call.core, &call.session)?;
        let expired = tokio::time::Instant::now() >= deadline;
        if let Some(batch) = batch(call, &classes, since, expired)? {
            return Ok(batch);
        }
        // A change, or the end of the time: both mean to look again.
        let _ = tokio::time::timeout_at(deadline, changes.changed()).await;
    }
}

/// The events since a generation; `None` if there are none and there is time left.
fn batch(call: &Call, classes: &[String], since: u64, expired: bool) -> Outcome<Option<Value>> {
    let db = call.core.db();
    // Deletions that are forgotten are never told: only the counts of references show that they are missing.
    let changes = db.changes_since(since);
    let mut events = Vec::new();
    for change in changes {
        if SILENT.contains(&change.class) || !wanted(classes, change.class, &change.reference) {
            continue;
        }
        // The first answer tells what is there, not what is gone.
        if since == 0 && change.operation == "del" {
            continue;
        }
        events.push(event(call, &db, &change));
    }
    if events.is_empty() && !expired {
        return Ok(None);
    }
    // Nothing for us: the same token again, as xapi does.
    let newest = if events.is_empty() { since } else { db.generation() };
    Ok(Some(Value::Map(vec![
        ("events".into(), Value::List(events)),
        ("valid_ref_counts".into(), counts(&db)),
        ("token".into(), token(newest).into()),
    ])))
}

fn event(call: &Call, db: &Database, change: &crate::model::Change) -> Value {
    let mut event = vec![
        ("id".to_owned(), Value::Text(change.generation.to_string())),
        ("timestamp".to_owned(), "0.0".into()),
        ("class".to_owned(), Value::Text(change.class.to_lowercase())),
        ("operation".to_owned(), change.operation.into()),
        ("ref".to_owned(), change.reference.as_str().into()),
    ];
    if change.operation != "del"
        && let Ok(record) = fields::record(&call.core, db, change.class, &change.reference)
    {
        event.push(("snapshot".to_owned(), record));
    }
    Value::Map(event)
}

fn counts(db: &Database) -> Value {
    let count = |class: &str| Value::Int32(i32::try_from(db.count(class)).unwrap_or(i32::MAX));
    let mut counts: Vec<_> = schema()
        .keys()
        .filter(|class| class.as_str() != "event")
        .map(|class| (class.to_lowercase(), if class == "message" { Value::Int32(0) } else { count(class) }))
        .collect();
    counts.extend(OTHER_CLASSES.iter().map(|class| ((*class).to_owned(), Value::Int32(0))));
    counts.sort_by(|one, other| other.0.cmp(&one.0));
    Value::Map(counts)
}

async fn next(call: &Call) -> Outcome {
    loop {
        let mut changes = call.core.changes();
        session::check(&call.core, &call.session)?;
        let events = {
            let mut registrations = call.core.registrations.lock().unwrap_or_else(PoisonError::into_inner);
            let Some((classes, seen)) = registrations.get_mut(&call.session) else {
                let track = format!("trackid={:032x}", track(&call.session));
                return Err(Failure::new("SESSION_NOT_REGISTERED", [track]));
            };
            let db = call.core.db();
            if *seen < db.forgotten() {
                *seen = db.generation();
                return Err(Failure::bare("EVENTS_LOST"));
            }
            let changes = db.changes_since(*seen);
            let events: Vec<Value> = changes
                .iter()
                .filter(|change| !SILENT.contains(&change.class) && wanted(classes, change.class, &change.reference))
                .map(|change| event(call, &db, change))
                .collect();
            *seen = db.generation();
            events
        };
        if !events.is_empty() {
            return Ok(Value::List(events));
        }
        // A change or half a minute: both mean to look again.
        let _ = tokio::time::timeout(LONGEST, changes.changed()).await;
    }
}

/// A number that stands for a session in texts, so that the reference itself stays a secret.
fn track(session: &str) -> u128 {
    let digest = ring::digest::digest(&ring::digest::SHA256, session.as_bytes());
    digest.as_ref().iter().take(16).fold(0, |sum, byte| (sum << 8) | u128::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_two_padded_numbers() {
        assert_eq!(read_token(&token(576)), Ok(576));
        assert_eq!(read_token(""), Ok(0));
        assert_eq!(read_token("garbage").unwrap_err().code, "EVENT_FROM_TOKEN_PARSE_FAILURE");
    }
}
