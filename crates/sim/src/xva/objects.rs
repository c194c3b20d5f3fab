//! Makes the objects of an archive in the pool, and removes them again if the import fails.

use std::collections::HashMap;

use super::Archived;
use crate::core::Core;
use crate::methods;
use crate::model::{Database, NULL, Value, new_ref, new_uuid};
use crate::rpc::{Failure, Outcome};

/// What the client asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wishes {
    /// `restore=true`: the uuids and addresses of the archive are kept.
    pub(crate) restore: bool,
    /// `force=true`: a halted VM of the same uuid is replaced whatever its version, one that runs is skipped, missing
    /// disks are skipped, and a failure leaves behind what was made until then.
    pub(crate) force: bool,
    /// `dry_run=true`: everything is checked and nothing is made.
    pub(crate) dry_run: bool,
    /// Where new disks go; `None` for an import of records only, whose disks have to be there.
    pub(crate) sr: Option<String>,
}

/// What an import has made.
#[derive(Debug, Default)]
pub(crate) struct Created {
    /// References of the VMs in the order of the archive: of those that are no snapshots, unless all are.
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

/// Makes everything; on a failure nothing is left of it, unless it was forced. A VM that was replaced stays replaced.
pub(crate) fn create(core: &Core, archive: &[Archived], wishes: &Wishes) -> Outcome<Created> {
    let mut created = Created::default();
    let done = make(core, archive, wishes, &mut created);
    match done {
        Ok(()) => Ok(created),
        Err(failure) => {
            if !wishes.force {
                remove(core, &created);
            }
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
        check_seeds(&core.db(), archive)?;
    }
    for object in of("VDI") {
        if let Some(vdi) = disk(core, archive, object, wishes, created)? {
            table.insert(object.id.clone(), vdi);
        }
    }
    let mut db = core.db();
    let mut all = Vec::new();
    for object in of("VM") {
        let replaced = match in_the_way(&db, object, wishes)? {
            InTheWay::Nothing => None,
            InTheWay::Halted(vm) => Some(vm),
            InTheWay::Skip => continue,
        };
        if wishes.dry_run {
            // A reference of nothing: what refers to it is checked all the same.
            table.insert(object.id.clone(), new_ref());
            continue;
        }
        if let Some(old) = replaced {
            remove_record(&mut db, &old);
        }
        let vm = vm(&mut db, object, wishes, created);
        all.push(vm.clone());
        table.insert(object.id.clone(), vm);
    }
    let lookup = |id: &str| table.get(id).cloned().unwrap_or_else(|| NULL.to_owned());
    for object in of("VBD") {
        check_device(object, archive, &table)?;
    }
    if wishes.dry_run {
        return Ok(());
    }
    for object in of("VM") {
        let vm = lookup(&object.id);
        for tie in ["snapshot_of", "parent"] {
            db.set("VM", &vm, tie, lookup(object.text(tie)));
        }
    }
    let own: Vec<String> = all.iter().filter(|vm| !db.flag("VM", vm, "is_a_snapshot")).cloned().collect();
    created.vms = if own.is_empty() { all } else { own };
    let mut networks: HashMap<String, String> = HashMap::new();
    for object in of("network") {
        networks.insert(object.id.clone(), network(&mut db, object, created));
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
        if wishes.restore {
            if db.by_uuid("VBD", object.text("uuid")).is_ok() {
                continue;
            }
            fields.extend(taken(object, &["uuid"]));
        }
        fields.extend([("VM", vm.into()), ("VDI", vdi.into()), ("empty", empty.into()), ("metrics", metrics.into())]);
        let vbd = db.create("VBD", fields);
        created.made.push(("VBD", vbd));
    }
    for object in of("VIF") {
        let network = networks.get(object.text("network")).cloned().unwrap_or_else(|| NULL.to_owned());
        let vm = lookup(object.text("VM"));
        if vm == NULL || network == NULL || (wishes.restore && db.by_uuid("VIF", object.text("uuid")).is_ok()) {
            continue;
        }
        let mac = if wishes.restore {
            object.text("MAC").to_owned()
        } else {
            let [.., a, b, c] = *uuid::Uuid::new_v4().as_bytes();
            format!("02:00:5e:{a:02x}:{b:02x}:{c:02x}")
        };
        let mut fields = taken(object, &["device", "MTU", "other_config", "locking_mode"]);
        if wishes.restore {
            fields.extend(taken(object, &["uuid"]));
        }
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

/// `DUPLICATE_MAC_SEED` if another VM than the one that is restored has the addresses of an archived one.
fn check_seeds(db: &Database, archive: &[Archived]) -> Outcome<()> {
    let origin_of_archived = |object: &Archived| {
        let tie = object.text("snapshot_of");
        let original = archive.iter().find(|known| known.class == "VM" && known.id == tie);
        original.map_or_else(|| db.text("VM", tie, "uuid"), |original| original.text("uuid").to_owned())
    };
    for object in archive.iter().filter(|object| object.class == "VM") {
        let config = object.value("other_config").cloned().unwrap_or(Value::Nil);
        let Some(seed) = config.member("mac_seed").map(Value::as_str) else { continue };
        let snapshot = object.value("is_a_snapshot").is_some_and(Value::as_bool);
        let origin = if snapshot { origin_of_archived(object) } else { object.text("uuid").to_owned() };
        for vm in db.refs("VM") {
            if db.map_value("VM", &vm, "other_config", "mac_seed").is_none_or(|known| known != seed) {
                continue;
            }
            let known = if db.flag("VM", &vm, "is_a_snapshot") { db.text("VM", &vm, "snapshot_of") } else { vm };
            if origin.is_empty() || db.text("VM", &known, "uuid") != origin {
                return Err(Failure::new("DUPLICATE_MAC_SEED", [seed]));
            }
        }
    }
    Ok(())
}

/// What is already where a VM is to be restored to.
enum InTheWay {
    Nothing,
    /// A VM that is replaced.
    Halted(String),
    /// A VM that runs, which a forced import leaves alone.
    Skip,
}

fn in_the_way(db: &Database, object: &Archived, wishes: &Wishes) -> Outcome<InTheWay> {
    let found = db.by_uuid("VM", object.text("uuid")).ok().filter(|_| wishes.restore);
    let Some(vm) = found else { return Ok(InTheWay::Nothing) };
    let state = db.text("VM", &vm, "power_state");
    if state != "Halted" {
        return match wishes.force {
            true => Ok(InTheWay::Skip),
            false => Err(Failure::new("VM_BAD_POWER_STATE", [vm, "Halted".to_owned(), state])),
        };
    }
    let (existing, new) = (db.int("VM", &vm, "version"), object.value("version").map_or(0, Value::as_int));
    if existing >= new && !wishes.force {
        let params = [vm, existing.to_string(), new.to_string()];
        return Err(Failure::new("VM_TO_IMPORT_IS_NOT_NEWER_VERSION", params));
    }
    Ok(InTheWay::Halted(vm))
}

/// A disk that was attached has to be there.
fn check_device(object: &Archived, archive: &[Archived], table: &HashMap<String, String>) -> Outcome<()> {
    let attached = object.value("currently_attached").is_some_and(Value::as_bool);
    if !attached || table.contains_key(object.text("VDI")) || !table.contains_key(object.text("VM")) {
        return Ok(());
    }
    let vm = archive.iter().find(|known| known.class == "VM" && known.id == object.text("VM"));
    let ejectable = object.text("type") == "CD" && vm.is_some_and(|vm| vm.text("domain_type") == "hvm");
    if ejectable { Ok(()) } else { Err(Failure::bare("IMPORT_ERROR_ATTACHED_DISKS_NOT_FOUND")) }
}

/// A VM that is replaced loses its record: its disks stay as orphans, `snapshot_of` of its snapshots dangles.
fn remove_record(db: &mut Database, vm: &str) {
    for (class, field) in [("VBD", "VBDs"), ("VIF", "VIFs"), ("VTPM", "VTPMs")] {
        for part in db.set_of("VM", vm, field) {
            db.destroy(class, &part);
        }
    }
    for (class, field) in [("VM_metrics", "metrics"), ("VM_guest_metrics", "guest_metrics")] {
        let part = db.text("VM", vm, field);
        db.destroy(class, &part);
    }
    db.destroy("VM", vm);
}

/// The network of that name or, failing that, of that bridge; a new one otherwise.
fn network(db: &mut Database, object: &Archived, created: &mut Created) -> String {
    for field in ["name_label", "bridge"] {
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
        let location = object.text("location");
        let candidates = db.refs_where("VDI", "location", location);
        if disc {
            let library = |vdi: &String| db.text("SR", &db.text("VDI", vdi, "SR"), "content_type") == "iso";
            return Ok(candidates.into_iter().find(library));
        }
        let known = source.and_then(|sr| db.by_uuid("SR", sr.text("uuid")).ok());
        let there =
            candidates.into_iter().find(|vdi| known.as_ref().is_some_and(|sr| db.text("VDI", vdi, "SR") == *sr));
        return match (there, known) {
            (Some(vdi), _) => Ok(Some(vdi)),
            (None, _) if wishes.force => Ok(None),
            (None, Some(sr)) => Err(Failure::new("VDI_LOCATION_MISSING", [sr.as_str(), location])),
            (None, None) => Err(Failure::bare("VDI_CONTENT_ID_MISSING")),
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
    // Counts how often it was restored.
    let version = if wishes.restore { object.value("version").map_or(0, Value::as_int) + 1 } else { 0 };
    fields.push(("version", Value::Int(version)));
    if wishes.restore {
        fields.push(("uuid", object.text("uuid").into()));
    }
    // The guest learns that its disks are not the ones that it knew.
    if !object.text("generation_id").is_empty() && !object.value("is_a_template").is_some_and(Value::as_bool) {
        let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
        fields.push(("generation_id", format!("{}:{}", high >> 1, low >> 1).into()));
    }
    let vm = db.create("VM", fields);
    if !wishes.restore {
        db.put("VM", &vm, "other_config", "mac_seed", new_uuid());
    }
    created.made.push(("VM", vm.clone()));
    vm
}
