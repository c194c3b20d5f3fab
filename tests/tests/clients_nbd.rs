//! libnbd's programs read the simulated hosts' NBD over verified TLS; qemu-img does not get past its list of exports.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test ends with a panic, and its helpers too")]

use std::process::Command;
use tokio::runtime::Runtime;
use xenvault_sim::{DiskContent, DiskSpec, SimOptions, SimPool, VmSpec};
use xenvault_tests::{images, programs};
use xenvault_xenapi::{ConnectOptions, Session, Trust, vdi};

const DISK_BYTES: u64 = 64 << 20;

/// A disk of a pool and the place where NBD serves it.
struct Place {
    pool: SimPool,
    session: Session,
    info: xenvault_xenapi::vdi_nbd_server_info::Record,
    folder: tempfile::TempDir,
    runtime: Runtime,
}

impl Place {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let content = DiskContent::Random { seed: 3, bytes: 5_000_000 };
        let vm = VmSpec::new("web").disk(DiskSpec::new(DISK_BYTES).content(content));
        let (pool, session, info) = runtime.block_on(async {
            let pool = SimPool::start(SimOptions { vms: vec![vm], ..SimOptions::default() }).await.unwrap();
            let trust = Trust::Fingerprint(pool.fingerprint().parse().unwrap());
            let options = ConnectOptions::new(&pool.url(), pool.user(), pool.password(), trust);
            let session = Session::login(options).await.unwrap();
            let disk = vdi::get_by_uuid(&session, &pool.vms()[0].disks[0].vdi).await.unwrap();
            let info = vdi::get_nbd_info(&session, &disk).await.unwrap().remove(0);
            (pool, session, info)
        });
        let folder = tempfile::tempdir().unwrap();
        // The name that libnbd looks for.
        std::fs::write(folder.path().join("ca-cert.pem"), &info.cert).unwrap();
        Self { pool, session, info, folder, runtime }
    }

    /// libnbd's URI of an export; characters of the name that have a meaning in one are escaped.
    fn uri(&self, name: &str) -> String {
        let name = name.replace('?', "%3F").replace('=', "%3D").replace(':', "%3A").replace('&', "%26");
        let (address, port) = (&self.info.address, self.info.port);
        format!("nbds://{address}:{port}/{name}?tls-certificates={}", self.folder.path().display())
    }

    fn assert_clean_end(self) {
        let Self { pool, session, runtime, .. } = self;
        runtime.block_on(session.logout()).unwrap();
        let host = pool.hosts()[0].uuid.clone();
        // The host takes its VBD away after the client has gone, so that the last one may still be there.
        while pool.new_objects().iter().any(|(class, ..)| class == "VBD") {
            std::thread::yield_now();
        }
        assert_eq!(pool.new_objects(), [], "{host}");
    }
}

#[test]
fn nbdinfo_and_nbdcopy_read_a_disk_over_tls() {
    let place = Place::new();
    let uri = place.uri(&place.info.exportname);
    let told = programs::finish(Command::new("nbdinfo").args(["--json", "--no-content", &uri]), "").unwrap();
    assert_eq!(told.code, Some(0), "{told:?}");
    let told = told.json().unwrap();
    assert_eq!(told["TLS"], true);
    assert_eq!(told["protocol"], "newstyle-fixed");
    assert_eq!(told["structured"], false);
    assert_eq!(told["exports"][0]["export-size"], DISK_BYTES);
    assert_eq!(told["exports"][0]["is_read_only"], true);

    let copy = place.folder.path().join("copy.raw");
    let copied = programs::finish(Command::new("nbdcopy").arg(&uri).arg(&copy), "").unwrap();
    assert_eq!(copied.code, Some(0), "{copied:?}");
    let found = images::sha256(&mut std::fs::File::open(copy).unwrap()).unwrap();
    let vm = &place.pool.vms()[0];
    let expected = place.pool.guest_read(&vm.uuid, "0", 0, DISK_BYTES).unwrap();
    assert_eq!(found, images::sha256(&mut expected.as_slice()).unwrap());
    let counters = place.pool.counters();
    assert!(counters.nbd_sent_bytes() >= DISK_BYTES, "{counters:?}");
    place.assert_clean_end();
}

#[test]
fn nbdinfo_is_refused_with_a_certificate_that_is_not_the_hosts() {
    let place = Place::new();
    let other = rcgen::generate_simple_self_signed(["other".to_owned()]).unwrap();
    std::fs::write(place.folder.path().join("ca-cert.pem"), other.cert.pem()).unwrap();
    let uri = place.uri(&place.info.exportname);
    let told = programs::finish(Command::new("nbdinfo").args(["--no-content", &uri]), "").unwrap();
    assert_ne!(told.code, Some(0), "{told:?}");
    assert!(told.stderr.contains("certificate"), "{told:?}");
    place.assert_clean_end();
}

#[test]
fn libnbd_gets_no_export_with_another_session_or_in_a_list() {
    let place = Place::new();
    let (name, _) = place.info.exportname.split_once('=').unwrap();
    let uri = place.uri(&format!("{name}=OpaqueRef:00000000-0000-0000-0000-000000000000"));
    let told = programs::finish(Command::new("nbdinfo").args(["--no-content", &uri]), "").unwrap();
    assert_ne!(told.code, Some(0), "{told:?}");
    let listed = programs::finish(Command::new("nbdinfo").args(["--list", &place.uri("")]), "").unwrap();
    assert_ne!(listed.code, Some(0), "{listed:?}");
    place.assert_clean_end();
}

#[test]
fn qemu_img_is_refused_at_its_list() {
    let place = Place::new();
    let credentials = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", place.folder.path().display());
    let image = format!(
        "driver=nbd,server.type=inet,server.host={},server.port={},tls-creds=tls,export={}",
        place.info.address, place.info.port, place.info.exportname
    );
    let mut command = Command::new("qemu-img");
    command.args(["info", "--object", &credentials, "--image-opts", &image]);
    let told = programs::finish(&mut command, "").unwrap();
    assert_eq!(told.code, Some(1), "{told:?}");
    // It asks for a list because this server does not know NBD_OPT_GO, and the real server's policy forbids lists.
    assert!(told.stderr.contains("option 3") || told.stderr.contains("(list)"), "{told:?}");
    place.assert_clean_end();
}
