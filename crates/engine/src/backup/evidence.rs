//! What the pool's messages say about the time since a base. Pure.

use xenvault_cbt::{PoolMessage, RunEnd};

/// One message of the pool, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Notice {
    /// Name, such as `VM_SHUTDOWN`.
    pub(crate) name: String,
    /// UUID of the object that it is about.
    pub(crate) object: String,
    /// Server time, seconds since 1970.
    pub(crate) at: u64,
}

/// Whose messages matter.
#[derive(Clone, Debug)]
pub(crate) struct Concerned<'a> {
    pub(crate) vm: &'a str,
    pub(crate) vdi: &'a str,
    pub(crate) pool: &'a str,
    /// The hosts on which the VM ran, then and now.
    pub(crate) hosts: Vec<&'a str>,
}

/// HA messages that warn, but say nothing about what happened to a VM.
const HARMLESS_HA: [&str; 6] = [
    "HA_POOL_OVERCOMMITTED",
    "HA_POOL_DROP_IN_PLAN_EXISTS_FOR",
    "HA_NETWORK_BONDING_ERROR",
    "HA_HEARTBEAT_APPROACHING_TIMEOUT",
    "HA_STATEFILE_APPROACHING_TIMEOUT",
    "HA_XAPI_HEALTHCHECK_APPROACHING_TIMEOUT",
];

/// Messages since `base_at` (that second included) that make the base suspect.
pub(crate) fn alarming(notices: &[Notice], concerned: &Concerned<'_>, base_at: u64) -> Vec<PoolMessage> {
    let mut found = Vec::new();
    for notice in notices.iter().filter(|notice| notice.at >= base_at) {
        let object = notice.object.as_str();
        if notice.name.starts_with("VDI_CBT_") && object == concerned.vdi {
            found.push(PoolMessage::Cbt);
        }
        let near = object == concerned.vm || object == concerned.pool || concerned.hosts.contains(&object);
        if notice.name.starts_with("HA_") && !HARMLESS_HA.contains(&notice.name.as_str()) && near {
            found.push(PoolMessage::Ha);
        }
    }
    found.dedup();
    found
}

/// How the run that the base saw, and every run since, came to its end.
///
/// Follows the messages of the VM from the state at the base to the state now. Where the two do not fit together the
/// answer is [`RunEnd::Unknown`]: a crash of a host leaves no message of the VM at all. `restarted` says that the VM's
/// start time is another one than at the base.
pub(crate) fn run_end(
    notices: &[Notice],
    vm: &str,
    base_at: u64,
    (ran_then, runs_now): (bool, bool),
    restarted: bool,
) -> RunEnd {
    let mut events: Vec<(u64, Event)> = notices
        .iter()
        .filter(|notice| notice.object == vm && notice.at > base_at)
        .filter_map(|notice| Some((notice.at, Event::of(&notice.name)?)))
        .collect();
    events.sort_by_key(|&(at, _)| at);
    // Somebody can have removed messages: a new run that nothing speaks of is not known to have come about cleanly.
    if restarted && !events.iter().any(|(_, event)| matches!(event, Event::Start | Event::Reboot)) {
        return RunEnd::Unknown;
    }
    let mut running = ran_then;
    let mut rest = events.as_slice();
    while let Some(&(at, _)) = rest.first() {
        let same_second = rest.iter().take_while(|&&(other, _)| other == at).count();
        let (group, later) = rest.split_at(same_second);
        match follow(group.iter().map(|&(_, event)| event).collect(), running) {
            Ok(after) => running = after,
            Err(end) => return end,
        }
        rest = later;
    }
    if running == runs_now { RunEnd::Clean } else { RunEnd::Unknown }
}

/// Applies events of one second, whose order is not known, in an order that makes sense, if there is one.
fn follow(mut events: Vec<Event>, mut running: bool) -> Result<bool, RunEnd> {
    if events.contains(&Event::Crash) {
        return Err(RunEnd::Unclean);
    }
    while !events.is_empty() {
        let Some(next) = events.iter().position(|event| event.fits(running)) else {
            return Err(RunEnd::Unknown);
        };
        running = match events.swap_remove(next) {
            Event::Start | Event::Reboot => true,
            Event::Stop | Event::Crash => false,
        };
    }
    Ok(running)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Start,
    Stop,
    Reboot,
    Crash,
}

impl Event {
    fn of(name: &str) -> Option<Self> {
        match name {
            "VM_STARTED" | "VM_RESUMED" => Some(Self::Start),
            "VM_SHUTDOWN" | "VM_SUSPENDED" => Some(Self::Stop),
            "VM_REBOOTED" => Some(Self::Reboot),
            "VM_CRASHED" => Some(Self::Crash),
            _ => None,
        }
    }

    fn fits(self, running: bool) -> bool {
        match self {
            Self::Start => !running,
            Self::Stop | Self::Reboot | Self::Crash => running,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notices(list: &[(u64, &str)]) -> Vec<Notice> {
        list.iter().map(|&(at, name)| Notice { name: name.into(), object: "vm".into(), at }).collect()
    }

    #[track_caller]
    fn check(expected: RunEnd, list: &[(u64, &str)], ran_then: bool, runs_now: bool) {
        assert_eq!(run_end(&notices(list), "vm", 10, (ran_then, runs_now), false), expected, "{list:?}");
    }

    #[test]
    fn clean_ends_are_followed_over_any_number_of_runs() {
        check(RunEnd::Clean, &[(11, "VM_SHUTDOWN")], true, false);
        check(RunEnd::Clean, &[(12, "VM_STARTED"), (11, "VM_SHUTDOWN")], true, true);
        check(RunEnd::Clean, &[(11, "VM_STARTED"), (11, "VM_SHUTDOWN")], true, true);
        check(RunEnd::Clean, &[(11, "VM_STARTED"), (11, "VM_SHUTDOWN")], false, false);
        check(RunEnd::Clean, &[(11, "VM_SUSPENDED"), (15, "VM_RESUMED"), (17, "VM_REBOOTED")], true, true);
        check(RunEnd::Clean, &[(11, "VM_SNAPSHOTTED")], false, false);
    }

    #[test]
    fn a_crash_of_a_host_leaves_a_gap_and_is_not_believed_to_be_clean() {
        check(RunEnd::Unknown, &[], true, false);
        check(RunEnd::Unknown, &[(12, "VM_STARTED")], true, true);
        check(RunEnd::Unknown, &[(11, "VM_SHUTDOWN"), (12, "VM_STARTED"), (14, "VM_STARTED")], true, true);
        check(RunEnd::Unknown, &[(11, "VM_STARTED")], false, false);
    }

    #[test]
    fn a_new_run_without_any_message_of_it_is_not_believed_to_be_clean() {
        let end = |list: &[(u64, &str)], states| run_end(&notices(list), "vm", 10, states, true);
        assert_eq!(end(&[], (true, true)), RunEnd::Unknown, "the messages were removed");
        assert_eq!(end(&[], (false, false)), RunEnd::Unknown);
        assert_eq!(end(&[(11, "VM_SHUTDOWN"), (12, "VM_STARTED")], (true, true)), RunEnd::Clean);
        assert_eq!(end(&[(11, "VM_REBOOTED")], (true, true)), RunEnd::Clean);
    }

    #[test]
    fn a_crash_of_the_guest_is_unclean() {
        check(RunEnd::Unclean, &[(11, "VM_CRASHED"), (12, "VM_STARTED")], true, true);
    }

    #[test]
    fn messages_from_before_the_base_and_of_other_vms_say_nothing() {
        check(RunEnd::Clean, &[(9, "VM_CRASHED"), (10, "VM_STARTED")], true, true);
        let other = [Notice { name: "VM_CRASHED".into(), object: "other".into(), at: 12 }];
        assert_eq!(run_end(&other, "vm", 10, (true, true), false), RunEnd::Clean);
    }

    #[test]
    fn x10_alarms_of_the_disk_the_vm_its_hosts_and_the_pool_count() {
        let concerned = Concerned { vm: "vm", vdi: "vdi", pool: "pool", hosts: vec!["h1"] };
        let alarms = |name: &str, object: &str, at| {
            alarming(&[Notice { name: name.into(), object: object.into(), at }], &concerned, 10)
        };
        assert_eq!(alarms("VDI_CBT_METADATA_INCONSISTENT", "vdi", 10), [PoolMessage::Cbt]);
        assert_eq!(alarms("VDI_CBT_RESIZE_FAILED", "other", 11), []);
        assert_eq!(alarms("VDI_CBT_RESIZE_FAILED", "vdi", 9), []);
        assert_eq!(alarms("HA_HOST_FAILED", "h1", 11), [PoolMessage::Ha]);
        assert_eq!(alarms("HA_HOST_FAILED", "h2", 11), []);
        assert_eq!(alarms("HA_STATEFILE_LOST", "pool", 11), [PoolMessage::Ha]);
        assert_eq!(alarms("HA_POOL_OVERCOMMITTED", "pool", 11), []);
    }
}
