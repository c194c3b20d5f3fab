//! Ownership marks on objects of the pool, and the judgement whether an object is ours to remove. Pure.
//!
//! xapi copies `other_config` when a disk is cloned, snapshotted or reverted, so the key alone proves nothing: the mark
//! names the object that it was put on, and whoever bears somebody else's mark is not ours.

use std::collections::BTreeMap;

/// Identity of the installation that made the object.
pub(crate) const INSTANCE: &str = "xenvault:instance";
/// The run that made it.
pub(crate) const RUN: &str = "xenvault:run";
/// What it is for, see [`Role`].
pub(crate) const ROLE: &str = "xenvault:role";
/// The object's own UUID.
pub(crate) const SELF: &str = "xenvault:self";
/// Until when a dead run's snapshot is kept for a second attempt: seconds since 1970.
pub(crate) const RESUME_UNTIL: &str = "xenvault:resume-until";
/// UUID of the VM that it was made for.
pub(crate) const VM: &str = "xenvault:vm";
/// The repository that it serves.
pub(crate) const REPOSITORY: &str = "xenvault:repository";
/// On a production disk: the nonce that was set when tracking was enabled (X11). Not a mark of ownership.
pub(crate) const CHAIN: &str = "xenvault:chain";
/// Beginning of all our keys.
pub(crate) const PREFIX: &str = "xenvault:";

/// What an object is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// A snapshot that a run reads.
    Snapshot,
    /// What changes are counted from.
    Base,
    /// A VM or disk that a restore is making.
    Restore,
}

impl Role {
    /// As it stands in the mark.
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Base => "base",
            Self::Restore => "restore",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Snapshot, Self::Base, Self::Restore].into_iter().find(|role| role.text() == text)
    }
}

/// Everything that a run writes into the marks of one object, but the object's own UUID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Marks {
    pub(crate) instance: String,
    pub(crate) run: String,
    pub(crate) role: Role,
    pub(crate) vm: String,
    pub(crate) repository: Option<String>,
    pub(crate) resume_until: Option<u64>,
}

impl Marks {
    /// The keys and values for the object `uuid`.
    pub(crate) fn entries(&self, uuid: &str) -> BTreeMap<String, String> {
        let mut entries = BTreeMap::from([
            (INSTANCE.to_owned(), self.instance.clone()),
            (RUN.to_owned(), self.run.clone()),
            (ROLE.to_owned(), self.role.text().to_owned()),
            (SELF.to_owned(), uuid.to_owned()),
            (VM.to_owned(), self.vm.clone()),
        ]);
        if let Some(repository) = &self.repository {
            entries.insert(REPOSITORY.to_owned(), repository.clone());
        }
        if let Some(until) = self.resume_until {
            entries.insert(RESUME_UNTIL.to_owned(), until.to_string());
        }
        entries
    }

    /// `other_config` of an object that has `present` already, with our keys in it and stale ones of ours out of it.
    pub(crate) fn applied(&self, uuid: &str, present: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut all = without_marks(present);
        all.extend(self.entries(uuid));
        all
    }
}

/// `other_config` without our marks of ownership; the chain nonce stays.
pub(crate) fn without_marks(other_config: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let ours = |key: &str| key.starts_with(PREFIX) && key != CHAIN;
    other_config.iter().filter(|(key, _)| !ours(key)).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// The name of a snapshot from its first moment: a crash can come between its creation and its marks (X30).
pub(crate) fn operation_name(what: &str, instance: &str, run: &str) -> String {
    format!("{what} [xenvault {instance} {run}]")
}

/// The installation and run in a name that [`operation_name`] gave.
pub(crate) fn parse_operation_name(name: &str) -> Option<(&str, &str)> {
    let inner = name.strip_suffix(']')?;
    let (_, inner) = inner.rsplit_once("[xenvault ")?;
    let (instance, run) = inner.split_once(' ')?;
    (is_uuid(instance) && is_uuid(run)).then_some((instance, run))
}

fn is_uuid(text: &str) -> bool {
    uuid::Uuid::try_parse(text).is_ok()
}

/// An object of the pool, as far as ownership goes.
#[derive(Clone, Debug)]
pub(crate) struct Candidate<'a> {
    pub(crate) uuid: &'a str,
    pub(crate) name: &'a str,
    pub(crate) other_config: &'a BTreeMap<String, String>,
    pub(crate) is_a_snapshot: bool,
    /// Whether the journal of a run of ours says that the run created it.
    pub(crate) in_journal: bool,
    /// Whether a VM that is not ours has a VBD on it.
    pub(crate) foreign_user: bool,
}

/// An object that is ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owned {
    pub(crate) run: String,
    /// `None` if only the name or the journal says that it is ours.
    pub(crate) role: Option<Role>,
    pub(crate) vm: Option<String>,
    pub(crate) repository: Option<String>,
    pub(crate) resume_until: Option<u64>,
}

/// Why an object is never touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotOurs {
    /// It bears no mark of ours.
    Unmarked,
    /// Another installation made it.
    OtherInstance,
    /// The marks were copied from another object (clone, snapshot, revert).
    CopiedMarks,
    /// Neither a snapshot nor known to have been created by us.
    NotCreatedByUs,
    /// A VM that is not ours uses it.
    InUse,
}

impl NotOurs {
    /// For people.
    pub(crate) const fn reason(self) -> &'static str {
        match self {
            Self::Unmarked => "it bears no mark of this installation",
            Self::OtherInstance => "another installation made it",
            Self::CopiedMarks => "its marks were copied from another object (by a clone or a revert)",
            Self::NotCreatedByUs => "it is no snapshot and the journal does not say that we made it",
            Self::InUse => "a VM that is not ours uses it",
        }
    }
}

/// Whether `candidate` is ours. The lease of its run is the caller's question.
pub(crate) fn judge(candidate: &Candidate<'_>, instance: &str) -> Result<Owned, NotOurs> {
    let owned = claim(candidate, instance)?;
    if !candidate.is_a_snapshot && !candidate.in_journal {
        return Err(NotOurs::NotCreatedByUs);
    }
    if candidate.foreign_user {
        return Err(NotOurs::InUse);
    }
    Ok(owned)
}

/// Whose it says it is: by its marks, else by the name that it was given at its creation.
fn claim(candidate: &Candidate<'_>, instance: &str) -> Result<Owned, NotOurs> {
    let mark = |key: &str| candidate.other_config.get(key).map(String::as_str);
    let by_name = parse_operation_name(candidate.name);
    let marked_self = mark(SELF) == Some(candidate.uuid);
    match (mark(INSTANCE), mark(RUN)) {
        (Some(owner), Some(run)) if marked_self => {
            if owner != instance {
                return Err(NotOurs::OtherInstance);
            }
            Ok(Owned {
                run: run.to_owned(),
                role: mark(ROLE).and_then(Role::parse),
                vm: mark(VM).map(str::to_owned),
                repository: mark(REPOSITORY).map(str::to_owned),
                resume_until: mark(RESUME_UNTIL).and_then(|text| text.parse().ok()),
            })
        }
        // A snapshot that we took of something that bears copied marks, before we could put our own on it: the name
        // was given by us in the very call that made it, so it counts; the copied marks do not.
        // What is no snapshot we made without marks, so copied ones tell a clone that somebody gave the name of ours.
        (Some(_), _) if !candidate.is_a_snapshot => Err(NotOurs::CopiedMarks),
        (marked, _) => match by_name {
            Some((owner, run)) if owner == instance => {
                Ok(Owned { run: run.to_owned(), role: None, vm: None, repository: None, resume_until: None })
            }
            Some(_) => Err(NotOurs::OtherInstance),
            None if marked.is_some() => Err(NotOurs::CopiedMarks),
            None => Err(NotOurs::Unmarked),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: &str = "11111111-1111-4111-8111-111111111111";
    const OTHER: &str = "22222222-2222-4222-8222-222222222222";
    const RUN_ID: &str = "33333333-3333-4333-8333-333333333333";

    fn marks(instance: &str) -> Marks {
        Marks {
            instance: instance.to_owned(),
            run: RUN_ID.to_owned(),
            role: Role::Snapshot,
            vm: "vm".to_owned(),
            repository: Some("repo".to_owned()),
            resume_until: Some(17),
        }
    }

    fn check(
        name: &str,
        other_config: &BTreeMap<String, String>,
        change: impl FnOnce(&mut Candidate<'_>),
    ) -> Result<Owned, NotOurs> {
        let mut candidate = Candidate {
            uuid: "disk-1",
            name,
            other_config,
            is_a_snapshot: true,
            in_journal: false,
            foreign_user: false,
        };
        change(&mut candidate);
        judge(&candidate, ME)
    }

    #[test]
    fn our_own_snapshot_is_ours_with_everything_that_its_marks_say() {
        let owned = check("x", &marks(ME).entries("disk-1"), |_| ()).unwrap();
        assert_eq!(owned.role, Some(Role::Snapshot));
        assert_eq!((owned.run.as_str(), owned.resume_until), (RUN_ID, Some(17)));
        assert_eq!((owned.vm.as_deref(), owned.repository.as_deref()), (Some("vm"), Some("repo")));
    }

    #[test]
    fn copied_marks_prove_nothing() {
        let copied = marks(ME).entries("disk-2");
        assert_eq!(check("production", &copied, |_| ()), Err(NotOurs::CopiedMarks));
        assert_eq!(check("production", &copied, |disk| disk.is_a_snapshot = false), Err(NotOurs::CopiedMarks));
    }

    #[test]
    fn what_is_no_snapshot_needs_the_journal() {
        let own = marks(ME).entries("disk-1");
        assert_eq!(check("x", &own, |disk| disk.is_a_snapshot = false), Err(NotOurs::NotCreatedByUs));
        let journaled = check("x", &own, |disk| {
            disk.is_a_snapshot = false;
            disk.in_journal = true;
        });
        assert!(journaled.is_ok());
    }

    #[test]
    fn another_installations_objects_and_used_disks_stay() {
        assert_eq!(check("x", &marks(OTHER).entries("disk-1"), |_| ()), Err(NotOurs::OtherInstance));
        let name = operation_name("backup", OTHER, RUN_ID);
        assert_eq!(check(&name, &BTreeMap::new(), |_| ()), Err(NotOurs::OtherInstance));
        assert_eq!(check("x", &marks(ME).entries("disk-1"), |disk| disk.foreign_user = true), Err(NotOurs::InUse));
        assert_eq!(check("x", &BTreeMap::new(), |_| ()), Err(NotOurs::Unmarked));
    }

    #[test]
    fn x30_a_snapshot_without_marks_is_known_by_its_name() {
        let name = operation_name("backup", ME, RUN_ID);
        assert_eq!(parse_operation_name(&name), Some((ME, RUN_ID)));
        assert_eq!(check(&name, &BTreeMap::new(), |_| ()).unwrap().run, RUN_ID);
        // The marks that its source bore are not its own.
        assert_eq!(check(&name, &marks(OTHER).entries("disk-0"), |_| ()).unwrap().run, RUN_ID);
        for strange in ["", "]", "a [xenvault b c]", "[xenvault ]", "x [xenvault 1]"] {
            assert_eq!(parse_operation_name(strange), None, "{strange:?}");
        }
    }

    #[test]
    fn a_clone_that_bears_the_name_of_our_snapshot_is_not_ours() {
        let name = operation_name("backup", ME, RUN_ID);
        let copied = marks(ME).entries("disk-0");
        let clone = check(&name, &copied, |vm| {
            vm.is_a_snapshot = false;
            vm.in_journal = true;
        });
        assert_eq!(clone, Err(NotOurs::CopiedMarks));
    }

    #[test]
    fn applying_marks_replaces_stale_ones_and_keeps_the_rest() {
        let mut present = marks(OTHER).entries("disk-0");
        present.insert(CHAIN.to_owned(), "nonce".to_owned());
        present.insert("folder".to_owned(), "/db".to_owned());
        let mut without_deadline = marks(ME);
        without_deadline.resume_until = None;
        let applied = without_deadline.applied("disk-1", &present);
        assert_eq!(applied.get(SELF).map(String::as_str), Some("disk-1"));
        assert_eq!(applied.get(CHAIN).map(String::as_str), Some("nonce"));
        assert_eq!(applied.get("folder").map(String::as_str), Some("/db"));
        assert_eq!(applied.get(RESUME_UNTIL), None);
    }
}
