//! Hosts that die under a backup.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may fail loudly"
)]

mod common;

use common::{Lab, MIB, data_disk};
use xenvault_sim::{SimOptions, VmSpec};

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_dies_in_the_middle_of_a_read_is_replaced_by_another_one_that_sees_the_sr() {
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(256 * MIB, 256 * MIB))];
    let lab = Lab::new(SimOptions { hosts: 3, vms, ..Default::default() }).await;
    let sim = lab.sim.clone();
    // Members only: the coordinator stays.
    let die = async {
        for (host, sent) in [(1, 16 * MIB), (2, 64 * MIB)] {
            while sim.counters().nbd_sent_bytes() < sent {
                tokio::task::yield_now().await;
            }
            sim.crash_host(host).await.unwrap();
        }
    };
    let (report, ()) = tokio::join!(lab.incremental(), die);
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}
