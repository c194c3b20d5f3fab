//! Finding the VM that a request names, and refusing what is no VM.

use xenvault_xenapi::{Session, vm};

use super::VmSelector;
use crate::EngineError;
use crate::pool::{Doing as _, is_gone};

/// The VM with its record.
pub(crate) async fn find(session: &Session, wanted: &VmSelector) -> Result<(vm::Ref, vm::Record), EngineError> {
    if let VmSelector::Uuid(uuid) | VmSelector::UuidOrName(uuid) = wanted
        && let Some(found) = by_uuid(session, uuid).await?
    {
        return checked(found);
    }
    let mut found = match wanted {
        VmSelector::Name(name) | VmSelector::UuidOrName(name) => by_name(session, name).await?,
        VmSelector::Uuid(_) => Vec::new(),
    };
    // Snapshots and templates often bear the name of their VM: they are refused only if there is nothing else.
    if found.iter().any(|(_, record)| refusal(record).is_none()) {
        found.retain(|(_, record)| refusal(record).is_none());
    }
    if found.len() > 1 {
        return Err(EngineError::AmbiguousVm {
            name: wanted.text().to_owned(),
            uuids: found.into_iter().map(|(_, record)| record.uuid).collect(),
        });
    }
    let unknown = || EngineError::UnknownVm { wanted: wanted.text().to_owned() };
    checked(found.pop().ok_or_else(unknown)?)
}

fn checked(found: (vm::Ref, vm::Record)) -> Result<(vm::Ref, vm::Record), EngineError> {
    match refusal(&found.1) {
        None => Ok(found),
        Some(what) => Err(EngineError::NotAVm { name: found.1.name_label, uuid: found.1.uuid, what }),
    }
}

pub(crate) fn refusal(record: &vm::Record) -> Option<&'static str> {
    if record.is_control_domain {
        Some("a control domain")
    } else if record.is_a_snapshot {
        Some("a snapshot")
    } else if record.is_a_template || record.is_default_template {
        Some("a template")
    } else {
        None
    }
}

async fn by_uuid(session: &Session, uuid: &str) -> Result<Option<(vm::Ref, vm::Record)>, EngineError> {
    let uuid = uuid.trim().to_ascii_lowercase();
    if uuid::Uuid::try_parse(&uuid).is_err() {
        return Ok(None);
    }
    let reference = match vm::get_by_uuid(session, &uuid).await {
        Err(error) if is_gone(&error) => return Ok(None),
        other => other.doing("look up the VM")?,
    };
    let record = vm::get_record(session, &reference).await.doing("read the VM's record")?;
    Ok(Some((reference, record)))
}

async fn by_name(session: &Session, name: &str) -> Result<Vec<(vm::Ref, vm::Record)>, EngineError> {
    let mut found = Vec::new();
    for reference in vm::get_by_name_label(session, name).await.doing("look up the VM by name")? {
        match vm::get_record(session, &reference).await {
            Ok(record) => found.push((reference, record)),
            // Destroyed between the two calls.
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error).doing("read the VM's record"),
        }
    }
    Ok(found)
}
