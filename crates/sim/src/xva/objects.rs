//! Makes the objects of an archive in the pool, and removes them again if the import fails.

use std::collections::HashMap;

use super::Archived;
use crate::core::Core;
use crate::methods;
use crate::model::{Database, NULL, Value, new_uuid};
use crate::rpc::{Failure, Outcome};

/// What the client asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wishes {
    /// `restore=true`: the uuids and addresses of the archive are kept.
    pub(crate) restore: bool,
    /// `force=true`: a living VM of the same uuid is replaced, missing disks are skipped.
    pub(crate) force: bool,
    /// Where new disks go; `None` for an import of records only, whose disks have to be there.
    pub(crate) sr: Option<String>,
}

/// What an import has made.
#[derive(Debug, Default)]
pub(crate) struct Created {
    /// References of the VMs that are no snapshots, in the order of the archive.
    pub(crate) vms: Vec<String>,
    /// New disks whose content is in the archive: their names there, their references here.
    pub(crate) disks: Vec<(String, String)>,
    made: Vec<(&'static str, String)>,
}

/// Fields of a VM that belong to the server, or that follow from other objects.
const NOT_TAKEN: &[&str] = &[
    "uuid",
    "VBDs",
    "VIFs",
    "VTPMs",
    "VUSBs",
    "VGPUs",
    "consoles",
    "crash_dumps",
    "snapshots",
    "children",
    "snapshot_of",
    "parent",
    "resident_on",
    "scheduled_to_be_resident_on",
    "affinity",
    "metrics",
    "guest_metrics",
    "domid",
    "power_state",
    "suspend_VDI",
    "suspend_SR",
    "attached_PCIs",
    "blobs",
    "appliance",
    "groups",
    "protection_policy",
    "snapshot_schedule",
];

/// Makes everything; on a failure nothing is left of it. A VM that was replaced stays replaced.
pub(crate) fn create(core: &Core, archive: &[Archived], wishes: &Wishes) -> Outcome<Created> {
    let mut created = Created::default();
    let done = make(core, archive, wishes, &mut created);
    match done {
        Ok(()) => Ok(created),
        Err(failure) => {
            remove(core, &created);
            Err(failure)
        }
    }
}

/// Takes back what an import has made.
pub(crate) fn remove(core: &Core, created: &Created) {
    for (_, vdi) in &created.disks {
        if let Ok(id) = core.disk_id(vdi) {
            // The failure that led here is the one to tell.
            let _ = core.storage.destroy(id);
        }
        core.db().destroy("VDI", vdi);
    }
    let mut db = core.db();
    for (class, reference) in created.made.iter().rev() {
        db.destroy(class, reference);
    }
}

fn make(core: &Core, archive: &[Archived], wishes: &Wishes, created: &mut Created) -> Outcome<()> {
    let mut table: HashMap<String, String> = HashMap::new();
    let of = |class: &'static str| archive.iter().filter(move |object| object.class == class);
    if wishes.restore {
        // Before anything is made: a VM in the way can end the import.
        for object in of("VM") {
            replace(&mut core.db(), object, wishes.force)?;
        }
    }
    for object in of("network") {
        let network = network(&mut core.db(), object, created);
        table.insert(object.id.clone(), network);
    }
    for object in of("VDI") {
        if let Some(vdi) = disk(core, archive, object, wishes, created)? {
            table.insert(object.id.clone(), vdi);
        }
    }
    let mut db = core.db();
    for object in of("VM") {
        let vm = vm(&mut db, object, wishes, created);
        table.insert(object.id.clone(), vm);
    }
    let lookup = |id: &str| table.get(id).cloned().unwrap_or_else(|| NULL.to_owned());
    for object in of("VM") {
        let vm = lookup(&object.id);
        for tie in ["snapshot_of", "parent"] {
            db.set("VM", &vm, tie, lookup(object.text(tie)));
        }
        if !object.value("is_a_snapshot").is_some_and(Value::as_bool) {
            created.vms.push(vm);
        }
    }
    for object in of("VBD") {
        let (vm, vdi) = (lookup(object.text("VM")), lookup(object.text("VDI")));
        let empty = vdi == NULL;
        // A device for a disk that is not there exists for discs only.
        if vm == NULL || (empty && object.text("type") != "CD") {
            continue;
        }
        let values = ["userdevice", "bootable", "mode", "type", "unpluggable", "other_config"];
        let metrics = db.create("VBD_metrics", Vec::new());
        let mut fields = taken(object, &values);
        fields.extend([("VM", vm.into()), ("VDI", vdi.into()), ("empty", empty.into()), ("metrics", metrics.into())]);
        let vbd = db.create("VBD", fields);
        created.made.push(("VBD", vbd));
    }
    for object in of("VIF") {
        let (vm, network) = (lookup(object.text("VM")), lookup(object.text("network")));
        if vm == NULL || network == NULL {
            continue;
        }
        let mac = if wishes.restore {
            object.text("MAC").to_owned()
        } else {
            let [.., a, b, c] = *uuid::Uuid::new_v4().as_bytes();
            format!("02:00:5e:{a:02x}:{b:02x}:{c:02x}")
        };
        let mut fields = taken(object, &["device", "MTU", "other_config", "locking_mode"]);
        fields.extend([("VM", vm.into()), ("network", network.into()), ("MAC", mac.into())]);
        let vif = db.create("VIF", fields);
        created.made.push(("VIF", vif));
    }
    drop(db);
    for object in of("VTPM") {
        let vm = lookup(object.text("VM"));
        if vm != NULL {
            let mut fields = taken(object, &["is_unique", "is_protected"]);
            fields.push(("VM", vm.into()));
            let vtpm = core.db().create("VTPM", fields);
            core.set_vtpm(&vtpm, object.text("content").to_owned());
            created.made.push(("VTPM", vtpm));
        }
    }
    Ok(())
}

fn taken<'a>(object: &Archived, names: &[&'a str]) -> Vec<(&'a str, Value)> {
    names.iter().filter_map(|name| Some((*name, object.value(name)?.clone()))).collect()
}

/// A living VM of the same uuid loses its record: its disks stay as orphans, `snapshot_of` of its snapshots dangles.
fn replace(db: &mut Database, object: &Archived, force: bool) -> Outcome<()> {
    let Ok(vm) = db.by_uuid("VM", object.text("uuid")) else { return Ok(()) };
    let state = db.text("VM", &vm, "power_state");
    if state != "Halted" {
        return Err(Failure::new("VM_BAD_POWER_STATE", [vm, "Halted".to_owned(), state]));
    }
    let (existing, new) = (db.int("VM", &vm, "version"), object.value("version").map_or(0, Value::as_int));
    if existing >= new && !force {
        let params = [vm, existing.to_string(), new.to_string()];
        return Err(Failure::new("VM_TO_IMPORT_IS_NOT_NEWER_VERSION", params));
    }
    for (class, field) in [("VBD", "VBDs"), ("VIF", "VIFs"), ("VTPM", "VTPMs")] {
        for part in db.set_of("VM", &vm, field) {
            db.destroy(class, &part);
        }
    }
    for (class, field) in [("VM_metrics", "metrics"), ("VM_guest_metrics", "guest_metrics")] {
        let part = db.text("VM", &vm, field);
        db.destroy(class, &part);
    }
    db.destroy("VM", &vm);
    Ok(())
}

/// The network of that bridge or, failing that, of that name; a new one otherwise.
fn network(db: &mut Database, object: &Archived, created: &mut Created) -> String {
    for field in ["uuid", "bridge", "name_label"] {
        if let Some(network) = db.refs_where("network", field, object.text(field)).into_iter().next() {
            return network;
        }
    }
    let network = db.create("network", taken(object, &["name_label", "name_description", "MTU", "other_config"]));
    created.made.push(("network", network.clone()));
    network
}

/// The disk of a record: a new one, or the one that is there; `None` if it is skipped.
fn disk(
    core: &Core,
    archive: &[Archived],
    object: &Archived,
    wishes: &Wishes,
    created: &mut Created,
) -> Outcome<Option<String>> {
    let source = archive.iter().find(|known| known.class == "SR" && known.id == object.text("SR"));
    let disc = source.is_some_and(|sr| sr.text("content_type") == "iso");
    let Some(sr) = wishes.sr.as_ref().filter(|_| !disc) else {
        let db = core.db();
        let there = db.by_uuid("VDI", object.text("uuid")).or_else(|failure| {
            db.refs_where("VDI", "location", object.text("location")).into_iter().next().ok_or(failure)
        });
        return match there {
            Ok(vdi) => Ok(Some(vdi)),
            Err(_) if disc || wishes.force => Ok(None),
            Err(_) => match source.map(|sr| db.by_uuid("SR", sr.text("uuid"))) {
                Some(Ok(sr)) => Err(Failure::new("VDI_LOCATION_MISSING", [sr.as_str(), object.text("location")])),
                _ => Err(Failure::bare("VDI_CONTENT_ID_MISSING")),
            },
        };
    };
    let size = u64::try_from(object.value("virtual_size").map_or(0, Value::as_int)).unwrap_or_default();
    let kept = ["name_label", "name_description", "type", "sharable", "other_config", "xenstore_data", "tags"];
    let fields = taken(object, &kept).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let vdi = methods::create_disk(core, sr, size, fields)?;
    created.disks.push((object.id.clone(), vdi.clone()));
    Ok(Some(vdi))
}

fn vm(db: &mut Database, object: &Archived, wishes: &Wishes, created: &mut Created) -> String {
    let metrics = db.create("VM_metrics", Vec::new());
    created.made.push(("VM_metrics", metrics.clone()));
    let mut fields: Vec<(&str, Value)> = object
        .fields
        .iter()
        .filter(|(name, _)| !NOT_TAKEN.contains(&name.as_str()))
        .map(|(name, value)| (name.as_str(), value.clone()))
        .collect();
    fields.push(("metrics", metrics.into()));
    if wishes.restore {
        fields.push(("uuid", object.text("uuid").into()));
    }
    let vm = db.create("VM", fields);
    if !wishes.restore {
        db.put("VM", &vm, "other_config", "mac_seed", new_uuid());
    }
    created.made.push(("VM", vm.clone()));
    vm
}
