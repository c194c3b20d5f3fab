//! Backups of a pool whose storage does not merge what they leave behind.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may fail loudly"
)]

mod common;

use common::{Lab, MIB, data_disk, name, noise};
use xenvault_engine::{BackupRequest, EngineError};
use xenvault_sim::{GarbageCollection, SimOptions, VmSpec};

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_nobody_merges_ends_in_the_storages_own_failure_and_goes_on_afterwards() {
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(4 * MIB, MIB))];
    let garbage_collection = GarbageCollection::OnOrder;
    let lab = Lab::new(SimOptions { vms, garbage_collection, ..Default::default() }).await;
    let backup = || lab.engine.backup(BackupRequest::incremental(name("vm-1")));
    let hidden = || lab.sim.records("VDI").values().filter(|disk| disk["managed"] == false).count();
    let mut done = 0;
    let error = loop {
        lab.write(done % 8 * 65_536, &noise(done, 4_096));
        match backup().await {
            Ok(_) => done += 1,
            Err(error) => break error,
        }
        assert!(done < 40, "the chain has no end");
    };
    // Each one froze what was written before it, and left a base copy in the chain.
    assert_eq!((done, hidden()), (29, 29));
    assert!(matches!(&error, EngineError::Pool { action, .. } if action == "take the snapshot"), "{error:?}");
    assert!(format!("{error:?}").contains("SR_BACKEND_FAILURE_109"), "{error:?}");
    lab.assert_clean(1);
    // One step of the collector is enough for the next one.
    let sr = lab.sim.srs()[0].uuid.clone();
    for _ in 0..2 {
        lab.sim.step_coalesce(&sr).await.unwrap();
    }
    let report = backup().await.unwrap();
    assert_eq!(report.disks[0].reason, "changed-blocks");
    lab.assert_equals_guest(&report, "vm-1").await;
    // Merges in between, and all at once, change nothing that a backup reads.
    lab.sim.coalesce_all(&sr).unwrap();
    assert_eq!(hidden(), 0);
    lab.write(MIB, &noise(99, 8_192));
    let report = backup().await.unwrap();
    assert_eq!(report.disks[0].reason, "changed-blocks");
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}
