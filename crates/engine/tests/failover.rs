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

/// Moves the coordinator when a call of that name has been made, for the first time since the backup began.
async fn move_at(method: &str) {
    let vms = vec![VmSpec::new("vm-1").disk(data_disk(16 * MIB, 16 * MIB))];
    let lab = Lab::new(SimOptions { hosts: 3, vms, ..Default::default() }).await;
    let sim = lab.sim.clone();
    let moved = async {
        while sim.counters().calls.get(method).copied().unwrap_or(0) == 0 {
            tokio::task::yield_now().await;
        }
        sim.move_coordinator(1).await.unwrap();
    };
    let (report, ()) = tokio::join!(lab.incremental(), moved);
    lab.assert_equals_guest(&report, "vm-1").await;
    lab.assert_clean(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_moves_at_vm_update_allowed_operations() {
    move_at("VM.update_allowed_operations").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_moves_at_message_get_since() {
    move_at("message.get_since").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_moves_at_vm_set_other_config() {
    move_at("VM.set_other_config").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_moves_at_vdi_set_other_config() {
    move_at("VDI.set_other_config").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_moves_at_vdi_get_nbd_info() {
    move_at("VDI.get_nbd_info").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_moves_at_vm_destroy() {
    move_at("VM.destroy").await;
}
