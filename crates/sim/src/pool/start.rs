//! Brings a pool to life: storage, objects, listeners.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::nbd_backend::Backend;
use super::{Inner, SimPool, build, restore};
use crate::core::{Core, HostNode};
use crate::methods;
use crate::model::Database;
use crate::nbd::{NbdOptions, NbdServer};
use crate::rpc::Failure;
use crate::storage::{Storage, VdiInfo};
use crate::{DiskContent, DiskSpec, GarbageCollection, SimError, SimOptions, control, http};

struct Built {
    core: Arc<Core>,
    srs: Vec<String>,
    vms: Vec<String>,
}

pub(super) async fn start(options: SimOptions) -> Result<SimPool, SimError> {
    let running: Vec<usize> =
        options.vms.iter().enumerate().filter(|(_, vm)| vm.running).map(|(index, _)| index).collect();
    let built = tokio::task::spawn_blocking(move || build_all(options)).await;
    let Built { core, srs, vms } = built.map_err(|_| SimError::Options("the pool cannot be built".to_owned()))??;
    let nbd = listen(&core)?;
    let listener = std::net::TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    let listener = listener.map_err(SimError::io("listen for its control interface"))?;
    let control = listener.local_addr().map_err(SimError::io("listen for its control interface"))?;
    let pool = SimPool { inner: Arc::new(Inner { core: Arc::clone(&core), nbd: Mutex::new(nbd), control, srs, vms }) };
    control::serve(&pool, &core, listener)?;
    methods::serve_collectors(&core, &pool.inner.srs);
    restore::serve(&pool, &core);
    for index in running {
        if let Some(vm) = pool.inner.vms.get(index) {
            let uuid = core.db().text("VM", vm, "uuid");
            pool.start_vm(&uuid, 0).await?;
        }
    }
    let baseline = {
        let db = core.db();
        let of =
            |class: &str| db.refs(class).into_iter().map(|reference| (class.to_owned(), reference)).collect::<Vec<_>>();
        ["VM", "VDI", "VBD", "VIF", "task", "session"].into_iter().flat_map(of).collect::<HashSet<_>>()
    };
    // Set once: the pool starts once.
    let _ = core.baseline.set(baseline);
    Ok(pool)
}

fn listen(core: &Arc<Core>) -> Result<Vec<Option<NbdServer>>, SimError> {
    let addresses: Vec<Ipv4Addr> = core.hosts.iter().map(|host| host.address).collect();
    let (port, listeners) = http::bind(&addresses)?;
    core.port.store(port, Ordering::Relaxed);
    let mut servers = Vec::new();
    for (index, listener) in listeners.into_iter().enumerate() {
        http::serve(core, index, listener)?;
        servers.push(Some(nbd_server(core, index)?));
    }
    Ok(servers)
}

/// Starts a host's NBD server, on the port that it had before if it had one.
pub(super) fn nbd_server(core: &Arc<Core>, index: usize) -> Result<NbdServer, SimError> {
    let node = core.host_at(index)?;
    let start = |port: u16| {
        NbdServer::start(NbdOptions {
            host: node.uuid,
            listen: SocketAddr::from((node.address, port)),
            certificates: vec![node.certificate.clone()],
            key: node.key.clone_key(),
            backend: Arc::new(Backend { core: Arc::clone(core) }),
            counters: core.nbd_counters.clone(),
            faults: core.nbd_faults.clone(),
        })
    };
    // Another process may have taken the port meanwhile.
    let server = start(node.nbd_port()).or_else(|_| start(0));
    let server = server.map_err(SimError::io("start an NBD server"))?;
    node.nbd_port.store(server.address().port(), Ordering::Relaxed);
    Ok(server)
}

fn build_all(options: SimOptions) -> Result<Built, SimError> {
    let storage = Storage::new().map_err(SimError::io("make a folder for its disks"))?;
    storage.watch_chains();
    let at_once = options.garbage_collection == GarbageCollection::AtOnce;
    let mut db = Database::default();
    let nodes = build::hosts(&options, &mut db)?;
    if !options.hardware_virtualisation {
        for host in db.refs("host") {
            db.set("host", &host, "capabilities", crate::model::Value::texts(["xen-3.0-x86_64"]));
        }
    }
    let mut srs = Vec::new();
    for spec in &options.srs {
        let uuid = uuid::Uuid::new_v4();
        storage.create_sr(uuid, spec.kind, spec.size);
        let refused = |error: crate::storage::SrError| SimError::from(Failure::from(error));
        storage.set_garbage_collection(uuid, at_once).map_err(refused)?;
        srs.push((spec.name.clone(), uuid, build::sr(&mut db, &nodes, spec, uuid)?));
    }
    if let (Some(pool), Some((_, _, sr))) = (db.refs("pool").first().cloned(), srs.first()) {
        db.set("pool", &pool, "default_SR", sr.as_str());
        db.set("pool", &pool, "suspend_image_SR", sr.as_str());
    }
    let vms = build_vms(&options, &storage, &mut db, &nodes, &srs)?;
    let srs = srs.into_iter().map(|(_, _, reference)| reference).collect();
    Ok(Built { core: Core::new(options, storage, nodes, db), srs, vms })
}

fn build_vms(
    options: &SimOptions,
    storage: &Storage,
    db: &mut Database,
    nodes: &[HostNode],
    srs: &[(String, uuid::Uuid, String)],
) -> Result<Vec<String>, SimError> {
    let mut disc = None;
    let mut vms = Vec::new();
    for spec in &options.vms {
        let vm = build::vm(db, &spec.name);
        for (number, disk) in spec.disks.iter().enumerate() {
            let found = match &disk.sr {
                Some(name) => srs.iter().find(|(known, ..)| known == name),
                None => srs.first(),
            };
            let name = disk.sr.clone().unwrap_or_default();
            let (_, sr_uuid, sr) = found.ok_or(SimError::Unknown { kind: "SR", name })?;
            let info = fill(storage, *sr_uuid, disk)?;
            let vdi = methods::introduce(db, sr, &info);
            db.set("VDI", &vdi, "name_label", format!("{} {number}", spec.name));
            build::device(db, &vm, &vdi, number, false);
        }
        if spec.cd {
            let disc = disc.get_or_insert_with(|| build::discs(db, nodes)).clone();
            build::device(db, &vm, &disc, spec.disks.len().max(3), true);
        }
        for number in 0..spec.vifs {
            build::interface(db, &vm, number);
        }
        vms.push(vm);
    }
    Ok(vms)
}

/// Makes a disk with its content.
fn fill(storage: &Storage, sr: uuid::Uuid, spec: &DiskSpec) -> Result<VdiInfo, SimError> {
    let id = uuid::Uuid::new_v4();
    let failure = |error: crate::storage::SrError| SimError::from(Failure::from(error));
    if let DiskContent::File(path) = &spec.content {
        let mut info = storage.create_vdi_from_file(sr, id, path).map_err(failure)?;
        if spec.size > info.virtual_size {
            storage.resize(id, spec.size).map_err(failure)?;
            info = storage.vdi(id).map_err(failure)?;
        }
        return tracked(storage, info, spec);
    }
    let made = match spec.content {
        DiskContent::Random { seed, bytes } => storage.create_vdi_with_noise(sr, id, spec.size, seed, bytes),
        _ => storage.create_vdi(sr, id, spec.size),
    };
    tracked(storage, made.map_err(failure)?, spec)
}

fn tracked(storage: &Storage, info: VdiInfo, spec: &DiskSpec) -> Result<VdiInfo, SimError> {
    let failure = |error: crate::storage::SrError| SimError::from(Failure::from(error));
    if spec.cbt {
        storage.enable_cbt(info.vdi, false).map_err(failure)?;
        return storage.vdi(info.vdi).map_err(failure);
    }
    Ok(info)
}
