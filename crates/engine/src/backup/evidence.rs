//! What the pool's messages say about the time since a base. Pure.

use std::collections::BTreeSet;

use xenvault_cbt::{PoolMessage, RunEnd};

/// One message of the pool, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Notice {
    /// Its own UUID.
    pub(crate) uuid: String,
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

/// How far back messages are looked at around a moment: more than the clocks of two coordinators may differ.
pub(crate) const WINDOW_SECONDS: u64 = 3600;
/// So many messages are remembered at most.
const REMEMBERED: usize = 100;
/// Digits of a message's UUID that are remembered.
const DIGITS: usize = 8;

/// Which messages there were already at some moment.
///
/// Messages are told apart by their UUIDs: their times have whole seconds only, and come from the clock of whichever
/// host was the coordinator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Every message before that was there, seconds since 1970.
    pub(crate) from: u64,
    /// Beginnings of the UUIDs of the later ones.
    known: BTreeSet<String>,
}

impl Seen {
    /// Remembers what matters of `notices`, which were read at `now` (server time).
    pub(crate) fn remember(notices: &[Notice], vm: &str, now: u64) -> Self {
        let from = now.saturating_sub(WINDOW_SECONDS);
        let mut kept: Vec<&Notice> = notices.iter().filter(|notice| notice.at >= from && notice.matters(vm)).collect();
        kept.sort_by_key(|notice| std::cmp::Reverse(notice.at));
        // What is left out counts as new later, which costs a full read and no data.
        let from = match kept.get(REMEMBERED) {
            Some(first_left_out) => first_left_out.at.saturating_add(1),
            None => from,
        };
        let known = kept.iter().filter(|notice| notice.at >= from).map(|notice| notice.digits().to_owned());
        Self { from, known: known.collect() }
    }

    /// For points that remember no messages: everything from a moment on is new.
    pub(crate) fn before(at: u64) -> Self {
        Self { from: at, known: BTreeSet::new() }
    }

    /// `FROM:UUID,UUID,...`
    pub(crate) fn to_text(&self) -> String {
        let known: Vec<&str> = self.known.iter().map(String::as_str).collect();
        format!("{}:{}", self.from, known.join(","))
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (from, known) = text.split_once(':')?;
        let known = known.split(',').filter(|digits| !digits.is_empty()).map(str::to_owned).collect();
        Some(Self { from: from.parse().ok()?, known })
    }

    /// Those that came since.
    pub(crate) fn newer<'a>(&self, notices: &'a [Notice]) -> Vec<&'a Notice> {
        notices.iter().filter(|notice| notice.at >= self.from && !self.known.contains(notice.digits())).collect()
    }
}

impl Notice {
    fn digits(&self) -> &str {
        self.uuid.get(..DIGITS).unwrap_or(&self.uuid)
    }

    /// Whether it can say something about changes of a disk of this VM, now or on another host later.
    fn matters(&self, vm: &str) -> bool {
        let lifecycle = self.object == vm && Event::of(&self.name).is_some();
        lifecycle || self.name.starts_with("VDI_CBT_") || self.is_about_a_failure()
    }

    /// Whether a host, or the pool's high availability, failed.
    fn is_about_a_failure(&self) -> bool {
        let ha = self.name.starts_with("HA_") && !HARMLESS_HA.contains(&self.name.as_str());
        ha || self.name == "CLUSTER_HOST_FENCING"
    }
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

/// Messages since the base that make it suspect.
pub(crate) fn alarming(notices: &[&Notice], concerned: &Concerned<'_>) -> Vec<PoolMessage> {
    let mut found = Vec::new();
    for notice in notices {
        let object = notice.object.as_str();
        if notice.name.starts_with("VDI_CBT_") && object == concerned.vdi {
            found.push(PoolMessage::Cbt);
        }
        let near = object == concerned.vm || object == concerned.pool || concerned.hosts.contains(&object);
        if notice.is_about_a_failure() && near {
            found.push(PoolMessage::Ha);
        }
    }
    found.dedup();
    found
}

/// How the run that the base saw, and every run since, came to its end.
///
/// Follows the messages since the base from the state at the base to the state now. Where the two do not fit together the
/// answer is [`RunEnd::Unknown`]: a crash of a host leaves no message of the VM at all. `restarted` says that the VM's
/// start time is another one than at the base.
pub(crate) fn run_end(notices: &[&Notice], vm: &str, (ran_then, runs_now): (bool, bool), restarted: bool) -> RunEnd {
    let mut events: Vec<(u64, Event)> = notices
        .iter()
        .filter(|notice| notice.object == vm)
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
        // A reboot leaves the state as it is: where it fits, nothing is lost by taking it first.
        let reboot = events.iter().position(|&event| event == Event::Reboot && event.fits(running));
        let Some(next) = reboot.or_else(|| events.iter().position(|event| event.fits(running))) else {
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
        let notice = |(number, &(at, name)): (usize, &(u64, &str))| Notice {
            uuid: format!("{number:08x}-0000"),
            name: name.into(),
            object: "vm".into(),
            at,
        };
        list.iter().enumerate().map(notice).collect()
    }

    #[track_caller]
    fn check(expected: RunEnd, list: &[(u64, &str)], ran_then: bool, runs_now: bool) {
        let notices = notices(list);
        let new = Seen::before(11).newer(&notices);
        assert_eq!(run_end(&new, "vm", (ran_then, runs_now), false), expected, "{list:?}");
    }

    #[test]
    fn clean_ends_are_followed_over_any_number_of_runs() {
        check(RunEnd::Clean, &[(11, "VM_SHUTDOWN")], true, false);
        check(RunEnd::Clean, &[(12, "VM_STARTED"), (11, "VM_SHUTDOWN")], true, true);
        check(RunEnd::Clean, &[(11, "VM_STARTED"), (11, "VM_SHUTDOWN")], true, true);
        check(RunEnd::Clean, &[(11, "VM_STARTED"), (11, "VM_SHUTDOWN")], false, false);
        check(RunEnd::Clean, &[(11, "VM_SUSPENDED"), (15, "VM_RESUMED"), (17, "VM_REBOOTED")], true, true);
        check(RunEnd::Clean, &[(11, "VM_SNAPSHOTTED")], false, false);
        check(RunEnd::Clean, &[(11, "VM_SHUTDOWN"), (11, "VM_STARTED"), (11, "VM_REBOOTED")], false, false);
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
        let end = |list: &[(u64, &str)], states| {
            let notices = notices(list);
            run_end(&Seen::before(11).newer(&notices), "vm", states, true)
        };
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
        let other = Notice { uuid: "u".into(), name: "VM_CRASHED".into(), object: "other".into(), at: 12 };
        assert_eq!(run_end(&[&other], "vm", (true, true), false), RunEnd::Clean);
    }

    #[test]
    fn x10_alarms_of_the_disk_the_vm_its_hosts_and_the_pool_count() {
        let concerned = Concerned { vm: "vm", vdi: "vdi", pool: "pool", hosts: vec!["h1"] };
        let alarms = |name: &str, object: &str, at| {
            let notice = Notice { uuid: "u".into(), name: name.into(), object: object.into(), at };
            alarming(&Seen::before(10).newer(&[notice]), &concerned)
        };
        assert_eq!(alarms("VDI_CBT_METADATA_INCONSISTENT", "vdi", 10), [PoolMessage::Cbt]);
        assert_eq!(alarms("VDI_CBT_RESIZE_FAILED", "other", 11), []);
        assert_eq!(alarms("VDI_CBT_RESIZE_FAILED", "vdi", 9), []);
        assert_eq!(alarms("HA_HOST_FAILED", "h1", 11), [PoolMessage::Ha]);
        assert_eq!(alarms("HA_HOST_FAILED", "h2", 11), []);
        assert_eq!(alarms("HA_STATEFILE_LOST", "pool", 11), [PoolMessage::Ha]);
        assert_eq!(alarms("HA_POOL_OVERCOMMITTED", "pool", 11), []);
        assert_eq!(alarms("CLUSTER_HOST_FENCING", "h1", 11), [PoolMessage::Ha]);
    }

    #[test]
    fn what_was_there_at_the_base_is_known_by_its_uuid_and_not_by_its_second() {
        let before = notices(&[(100, "VM_STARTED"), (90, "VM_SHUTDOWN")]);
        let seen = Seen::remember(&before, "vm", 100);
        assert_eq!(Seen::parse(&seen.to_text()), Some(seen.clone()));
        assert!(seen.newer(&before).is_empty());
        // Two more, in the same second.
        let after = notices(&[(100, "VM_STARTED"), (90, "VM_SHUTDOWN"), (100, "VM_SHUTDOWN"), (100, "VM_STARTED")]);
        assert_eq!(seen.newer(&after).len(), 2);
        assert_eq!(run_end(&seen.newer(&after), "vm", (true, true), true), RunEnd::Clean);
        assert_eq!(Seen::parse("x:1"), None);
        assert_eq!(Seen::parse(""), None);
    }

    #[test]
    fn so_many_messages_that_they_are_not_all_remembered_count_as_new() {
        let list: Vec<(u64, &str)> = (0..150).map(|n| (10_000 + n, "VM_REBOOTED")).collect();
        let all = notices(&list);
        let seen = Seen::remember(&all, "vm", 10_200);
        assert!(seen.newer(&all).is_empty() && seen.known.len() == 100, "{seen:?}");
        let crowded = notices(&[(10_000, "VM_REBOOTED"); 150]);
        assert!(Seen::remember(&crowded, "vm", 10_200).known.is_empty());
    }
}
