//! Whether the changes since a base may be believed. Pure: the evidence is read by the caller, just before use.

use crate::reason::{FullReason, SuspectCause};

/// What is left of the base snapshot, re-read just before use (U02, X19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseState {
    /// The snapshot still has its data; it can be read and compared with.
    WithData,
    /// Only the tracking data is left (`cbt_metadata`): good as `vdi_from`, never to be read.
    BitmapOnly,
    /// It does not exist any more, or has no tracking.
    Gone,
}

/// What the caller wants to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// What changed, if that can be known.
    Changes,
    /// Everything.
    Everything,
}

/// Whether changes of the disk are recorded, as read back after it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// On.
    Enabled,
    /// Off, though it could be on.
    Disabled,
    /// The licence, SR or disk can not do it (X09).
    Unsupported,
}

/// Power state of the VM at a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Running or paused: its disks are open on the resident host.
    Running,
    /// Halted: no disk is open.
    Halted,
    /// Suspended to disk: no disk is open.
    Suspended,
}

/// Where and since when a VM ran at the time of a snapshot. `None` is "not known" and makes a base suspect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmRun {
    /// Power state.
    pub power: Option<Power>,
    /// UUID of the host on which it ran; not looked at unless it ran.
    pub host_uuid: Option<String>,
    /// Boot time of that host, seconds since 1970; not looked at unless it ran.
    pub host_boot_time: Option<u64>,
    /// Start of the run, seconds since 1970 (`VM_metrics.start_time`; of the last run if it does not run now; 0 if it
    /// never ran).
    pub start_time: Option<u64>,
}

/// How the runs of the VM that ended since the base came to their end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// All of them cleanly: shut down, rebooted or suspended through the toolstack. Also if none ended.
    Clean,
    /// At least one by a crash of its host, an HA restart, or a forced reset of the power state.
    Unclean,
    /// The pool's messages do not tell, or do not fit to what is known about the VM then and now.
    Unknown,
}

/// A message of the pool since the base that concerns the disk, the VM or its host (X10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PoolMessage {
    /// `VDI_CBT_METADATA_INCONSISTENT`, `VDI_CBT_RESIZE_FAILED` or `VDI_CBT_SNAPSHOT_FAILED` on this disk.
    Cbt,
    /// A host failed or was fenced (`HA_...`, `CLUSTER_HOST_FENCING`).
    Ha,
}

/// What the last point recorded about the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseRecord {
    /// UUID of the live VDI.
    pub vdi_uuid: String,
    /// UUID of its SR.
    pub sr_uuid: String,
    /// Virtual size at that time, in bytes.
    pub virtual_size: u64,
    /// Nonce of ours that was set when tracking was enabled (X11).
    pub chain_nonce: Option<String>,
    /// The VM's run at that time.
    pub run: VmRun,
}

/// What is true now, at the new snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskNow {
    /// UUID of the live VDI.
    pub vdi_uuid: String,
    /// UUID of its SR.
    pub sr_uuid: String,
    /// Virtual size of the new snapshot, in bytes.
    pub virtual_size: u64,
    /// Tracking of the live disk.
    pub live_tracking: Tracking,
    /// Tracking of the new snapshot itself (X10: the snapshot can be older than the effect of enabling).
    pub snapshot_tracking: Tracking,
    /// Nonce of ours that the live disk carries.
    pub chain_nonce: Option<String>,
    /// State of the base snapshot.
    pub base: BaseState,
    /// UUID of the VDI that the base is a snapshot of, `None` if it names none.
    pub base_snapshot_of: Option<String>,
    /// The VM's run.
    pub run: VmRun,
    /// Boot time, as it is now, of the host on which the VM ran at the base; `None` if that is not known. Tells more
    /// about a run whose end nobody saw; a run that was moved away or ended cleanly does not depend on it.
    pub base_host_boot_time: Option<u64>,
    /// How the runs since the base ended.
    pub run_end: RunEnd,
    /// Messages since the base; `None` if they could not be read.
    pub messages: Option<Vec<PoolMessage>>,
}

/// Everything that the decision needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseEvidence {
    /// What was asked for.
    pub level: Level,
    /// The last point of this disk, if there is one.
    pub base: Option<BaseRecord>,
    /// The disk now.
    pub now: DiskNow,
}

/// Whether to ask for the changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseDecision {
    /// Ask `list_changed_blocks` (base, new snapshot) and read what it names.
    UseBase,
    /// Read the whole disk.
    ReadWhole(FullReason),
}

/// Boot times are read from a clock that is set now and then: the same boot can differ by so many seconds. No host
/// comes back from a crash faster and within the same minute as it booted before.
const BOOT_TIME_SLACK_SECONDS: u64 = 30;

/// Decides from evidence; whatever is unknown counts as suspect.
///
/// The most specific reason is given: a disk that was replaced is not reported as one whose base is gone.
pub fn decide(evidence: &BaseEvidence) -> BaseDecision {
    match objection(evidence) {
        Some(reason) => BaseDecision::ReadWhole(reason),
        None => BaseDecision::UseBase,
    }
}

fn objection(evidence: &BaseEvidence) -> Option<FullReason> {
    if evidence.level == Level::Everything {
        return Some(FullReason::Requested);
    }
    let Some(base) = &evidence.base else {
        return Some(FullReason::FirstBackup);
    };
    let now = &evidence.now;
    identity(base, now)
        .or_else(|| tracking(base, now))
        .or_else(|| snapshot(base, now))
        .or_else(|| suspicion(base, now).map(FullReason::Suspect))
}

/// Is it the same disk (X15, X20)?
fn identity(base: &BaseRecord, now: &DiskNow) -> Option<FullReason> {
    if now.sr_uuid != base.sr_uuid {
        Some(FullReason::Migrated)
    } else if now.vdi_uuid != base.vdi_uuid {
        Some(FullReason::DiskReplaced)
    } else if now.virtual_size < base.virtual_size {
        Some(FullReason::Shrunk)
    } else {
        None
    }
}

/// Was tracking on all the time (X09, X10, X11)?
fn tracking(base: &BaseRecord, now: &DiskNow) -> Option<FullReason> {
    match (now.live_tracking, now.snapshot_tracking) {
        (Tracking::Unsupported, _) | (_, Tracking::Unsupported) => return Some(FullReason::CbtUnsupported),
        (Tracking::Disabled, _) | (_, Tracking::Disabled) => return Some(FullReason::CbtDisabled),
        (Tracking::Enabled, Tracking::Enabled) => {}
    }
    match (&base.chain_nonce, &now.chain_nonce) {
        (None, _) => Some(FullReason::Suspect(SuspectCause::Unknown)),
        (then, now) if then != now => Some(FullReason::ChainBroken),
        _ => None,
    }
}

/// Is the base there, and is it a snapshot of this disk (U02, X12)?
fn snapshot(base: &BaseRecord, now: &DiskNow) -> Option<FullReason> {
    if now.base == BaseState::Gone {
        return Some(FullReason::BaseGone);
    }
    match &now.base_snapshot_of {
        None => Some(FullReason::Suspect(SuspectCause::Unknown)),
        Some(uuid) if *uuid != base.vdi_uuid => Some(FullReason::Unrelated),
        Some(_) => None,
    }
}

/// Could bits be missing (X10; a host that crashes loses the bits that were not on disk yet)?
fn suspicion(base: &BaseRecord, now: &DiskNow) -> Option<SuspectCause> {
    match &now.messages {
        None => return Some(SuspectCause::Unknown),
        Some(messages) if messages.contains(&PoolMessage::Cbt) => return Some(SuspectCause::CbtMessage),
        Some(messages) if messages.contains(&PoolMessage::Ha) => return Some(SuspectCause::HaMessage),
        Some(_) => {}
    }
    let (then, run) = (&base.run, &now.run);
    let (Some(power_then), Some(power_now)) = (then.power, run.power) else {
        return Some(SuspectCause::Unknown);
    };
    let (Some(start_then), Some(start_now)) = (then.start_time, run.start_time) else {
        return Some(SuspectCause::Unknown);
    };
    // A run that is going on now, or went on then, is only as good as the knowledge about its host.
    for (power, run) in [(power_then, then), (power_now, run)] {
        if power == Power::Running && (run.host_uuid.is_none() || run.host_boot_time.is_none()) {
            return Some(SuspectCause::Unknown);
        }
    }
    match now.run_end {
        RunEnd::Unclean => return Some(SuspectCause::UncleanShutdown),
        RunEnd::Unknown => {
            let booted_since = now.base_host_boot_time.is_some_and(|time| rebooted(then.host_boot_time, Some(time)));
            let crashed = power_then == Power::Running && booted_since;
            return Some(if crashed { SuspectCause::HostRebooted } else { SuspectCause::Unknown });
        }
        RunEnd::Clean => {}
    }
    // On another host it was moved alive, which closes the disk properly on the old one.
    let same_run = start_then == start_now && power_then == power_now;
    let same_host = power_now == Power::Running && then.host_uuid == run.host_uuid;
    let crashed = same_run && same_host && rebooted(then.host_boot_time, run.host_boot_time);
    crashed.then_some(SuspectCause::HostRebooted)
}

fn rebooted(then: Option<u64>, now: Option<u64>) -> bool {
    match (then, now) {
        (Some(then), Some(now)) => then.abs_diff(now) > BOOT_TIME_SLACK_SECONDS,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(host: &str, boot: u64, start: u64) -> VmRun {
        VmRun {
            power: Some(Power::Running),
            host_uuid: Some(host.to_owned()),
            host_boot_time: Some(boot),
            start_time: Some(start),
        }
    }

    fn at_rest(power: Power, start: u64) -> VmRun {
        VmRun { power: Some(power), host_uuid: None, host_boot_time: None, start_time: Some(start) }
    }

    /// A disk of a running VM to which nothing happened.
    fn good() -> BaseEvidence {
        BaseEvidence {
            level: Level::Changes,
            base: Some(BaseRecord {
                vdi_uuid: "disk".into(),
                sr_uuid: "sr".into(),
                virtual_size: 100,
                chain_nonce: Some("nonce".into()),
                run: running("host", 1_000, 2_000),
            }),
            now: DiskNow {
                vdi_uuid: "disk".into(),
                sr_uuid: "sr".into(),
                virtual_size: 100,
                live_tracking: Tracking::Enabled,
                snapshot_tracking: Tracking::Enabled,
                chain_nonce: Some("nonce".into()),
                base: BaseState::BitmapOnly,
                base_snapshot_of: Some("disk".into()),
                run: running("host", 1_000, 2_000),
                base_host_boot_time: Some(1_000),
                run_end: RunEnd::Clean,
                messages: Some(Vec::new()),
            },
        }
    }

    /// `expected` is the stable text of the reason, or `use-base`.
    #[track_caller]
    fn check(expected: &str, change: impl FnOnce(&mut BaseEvidence)) {
        let mut evidence = good();
        change(&mut evidence);
        let text = match decide(&evidence) {
            BaseDecision::UseBase => "use-base".to_owned(),
            BaseDecision::ReadWhole(reason) => reason.to_string(),
        };
        assert_eq!(text, expected, "{evidence:#?}");
    }

    fn base(evidence: &mut BaseEvidence) -> &mut BaseRecord {
        evidence.base.as_mut().unwrap()
    }

    #[test]
    fn an_undisturbed_disk_uses_its_base_with_or_without_data() {
        check("use-base", |_| {});
        check("use-base", |e| e.now.base = BaseState::WithData);
    }

    #[test]
    fn a_full_read_has_the_reason_that_the_caller_knows() {
        check("requested", |e| e.level = Level::Everything);
        check("first-backup", |e| e.base = None);
        check("first-backup", |e| (e.base, e.now.live_tracking) = (None, Tracking::Disabled));
    }

    #[test]
    fn x09_a_disk_that_can_not_be_tracked_is_read_whole() {
        check("cbt-unsupported", |e| e.now.live_tracking = Tracking::Unsupported);
        for code in ["SR_OPERATION_NOT_SUPPORTED", "LICENSE_RESTRICTION", "MESSAGE_METHOD_UNKNOWN"] {
            assert_eq!(FullReason::from_failure(code).to_string(), "cbt-unsupported", "{code}");
        }
    }

    #[test]
    fn x10_tracking_that_went_off_or_came_too_late_is_noticed() {
        check("cbt-disabled", |e| e.now.live_tracking = Tracking::Disabled);
        check("cbt-disabled", |e| e.now.snapshot_tracking = Tracking::Disabled);
        check("suspect:cbt-message", |e| e.now.messages = Some(vec![PoolMessage::Ha, PoolMessage::Cbt]));
        check("suspect:ha-message", |e| e.now.messages = Some(vec![PoolMessage::Ha]));
        check("suspect:unknown", |e| e.now.messages = None);
    }

    #[test]
    fn x11_two_chains_are_never_compared() {
        check("chain-broken", |e| e.now.chain_nonce = Some("another".into()));
        check("chain-broken", |e| e.now.chain_nonce = None);
        check("suspect:unknown", |e| base(e).chain_nonce = None);
        check("suspect:unknown", |e| (base(e).chain_nonce, e.now.chain_nonce) = (None, None));
    }

    #[test]
    fn x12_every_failure_of_the_listing_means_reading_the_whole_disk() {
        for (code, text) in [
            ("SR_BACKEND_FAILURE_460", "unrelated"),
            ("SR_BACKEND_FAILURE_459", "bitmap-invalid"),
            ("VDI_IN_USE", "listing-failed"),
            ("SR_BACKEND_FAILURE_9999", "listing-failed"),
            ("", "listing-failed"),
        ] {
            assert_eq!(FullReason::from_failure(code).to_string(), text, "{code}");
        }
        check("unrelated", |e| e.now.base_snapshot_of = Some("another disk".into()));
        check("suspect:unknown", |e| e.now.base_snapshot_of = None);
    }

    #[test]
    fn x15_a_grown_disk_keeps_its_base_and_a_smaller_or_other_one_does_not() {
        check("use-base", |e| e.now.virtual_size = 101);
        check("shrunk", |e| e.now.virtual_size = 99);
        check("disk-replaced", |e| e.now.vdi_uuid = "another".into());
    }

    #[test]
    fn x19_only_a_gone_base_can_not_be_counted_from() {
        check("base-gone", |e| e.now.base = BaseState::Gone);
        check("use-base", |e| e.now.base = BaseState::BitmapOnly);
    }

    #[test]
    fn x18_lost_metadata_is_a_gone_base() {
        for code in ["VDI_NO_CBT_METADATA", "HANDLE_INVALID", "UUID_INVALID"] {
            assert_eq!(FullReason::from_failure(code).to_string(), "base-gone", "{code}");
        }
    }

    #[test]
    fn x20_a_disk_on_another_sr_was_migrated() {
        check("migrated", |e| e.now.sr_uuid = "another".into());
        check("migrated", |e| (e.now.sr_uuid, e.now.vdi_uuid) = ("another".into(), "another".into()));
    }

    #[test]
    fn u01_the_most_specific_reason_is_given() {
        check("disk-replaced", |e| {
            e.now.vdi_uuid = "another".into();
            e.now.base = BaseState::Gone;
            e.now.live_tracking = Tracking::Disabled;
        });
        check("cbt-disabled", |e| (e.now.base, e.now.live_tracking) = (BaseState::Gone, Tracking::Disabled));
    }

    #[test]
    fn a_run_that_goes_on_is_trusted_while_its_host_stays_up() {
        check("use-base", |e| e.now.run = running("host", 1_001, 2_000));
        check("suspect:host-rebooted", |e| e.now.run = running("host", 1_500, 2_000));
        // Moved alive.
        check("use-base", |e| e.now.run = running("another", 77, 2_000));
    }

    #[test]
    fn a_run_that_ended_must_have_ended_cleanly() {
        for run in [
            at_rest(Power::Halted, 2_000),
            at_rest(Power::Suspended, 2_000),
            running("host", 1_000, 3_000),
            running("another", 77, 3_000),
        ] {
            for (end, text) in [
                (RunEnd::Clean, "use-base"),
                (RunEnd::Unclean, "suspect:unclean-shutdown"),
                (RunEnd::Unknown, "suspect:unknown"),
            ] {
                check(text, |e| (e.now.run, e.now.run_end) = (run.clone(), end));
            }
        }
    }

    #[test]
    fn x10_a_run_that_seems_to_go_on_must_fit_to_the_messages() {
        // A restart within the same second as the start before: only the messages tell.
        check("suspect:unknown", |e| e.now.run_end = RunEnd::Unknown);
        check("suspect:unclean-shutdown", |e| e.now.run_end = RunEnd::Unclean);
    }

    #[test]
    fn x10_a_host_that_was_booted_since_explains_an_end_that_nobody_saw() {
        let crashed = |e: &mut BaseEvidence| {
            e.now.run = at_rest(Power::Halted, 2_000);
            e.now.run_end = RunEnd::Unknown;
            e.now.base_host_boot_time = Some(5_000);
        };
        check("suspect:host-rebooted", crashed);
        check("suspect:unknown", |e| {
            crashed(e);
            e.now.base_host_boot_time = None;
        });
        check("suspect:unknown", |e| {
            crashed(e);
            base(e).run = at_rest(Power::Suspended, 2_000);
        });
        // Booted after the VM had left it in good order.
        check("use-base", |e| e.now.base_host_boot_time = Some(1_010));
        check("use-base", |e| {
            crashed(e);
            e.now.run_end = RunEnd::Clean;
        });
        check("use-base", |e| (e.now.run, e.now.base_host_boot_time) = (running("another", 77, 2_000), Some(5_000)));
    }

    #[test]
    fn a_vm_that_did_not_run_at_all_needs_no_host() {
        for power in [Power::Halted, Power::Suspended] {
            check("use-base", |e| {
                base(e).run = at_rest(power, 2_000);
                e.now.run = at_rest(power, 2_000);
            });
        }
        check("suspect:unknown", |e| {
            base(e).run = at_rest(Power::Halted, 1_000);
            e.now.run_end = RunEnd::Unknown;
        });
    }

    #[test]
    fn every_missing_piece_makes_it_suspect() {
        let cuts: [fn(&mut VmRun); 4] =
            [|r| r.power = None, |r| r.host_uuid = None, |r| r.host_boot_time = None, |r| r.start_time = None];
        for cut in cuts {
            check("suspect:unknown", |e| cut(&mut base(e).run));
            check("suspect:unknown", |e| cut(&mut e.now.run));
        }
    }
}
