//! XenAPI's methods: checks that come before every call, background tasks, and who does what.

mod call;
mod dispatch;
mod event;
mod fields;
mod garbage;
mod generic;
mod host;
mod host_life;
mod message;
mod nbd_info;
mod network;
mod operation;
mod pool;
pub(crate) mod rbac;
pub(crate) mod session;
mod sr;
mod sr_checks;
mod task;
mod vbd;
mod vbd_plug;
mod vdi;
mod vdi_cbt;
mod vdi_checks;
mod vdi_copy;
mod vif;
mod vm;
mod vm_checks;
mod vm_clone;
mod vm_migrate;
mod vm_move;
mod vm_power;
mod vm_revert;
mod vm_set;
mod vm_suspend;
mod vtpm;
mod vusb;

pub(crate) use call::Call;
pub(crate) use dispatch::{Reply, dispatch};
pub(crate) use fields::record;
pub(crate) use garbage::{
    Collectors, apply as apply_chain_changes, begin as begin_coalesce, end as end_coalesce, serve as serve_collectors,
};
pub(crate) use host_life::{
    begin_fail_over, boot_host, crash_host, end_fail_over, end_sessions, end_toolstack_work, host_failed,
    move_coordinator, stop_host, toolstack_started,
};
pub(crate) use operation::Operation;
pub(crate) use sr::{features, live_hosts_of_all};
pub(crate) use task::{complete, fail, new_task};
pub(crate) use vbd_plug::{plug_in_control_domain, unplug_and_destroy};
pub(crate) use vdi::{create_disk, introduce};
pub(crate) use vm_checks::check as check_vm;
