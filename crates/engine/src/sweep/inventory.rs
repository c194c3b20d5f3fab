//! What the pool holds, read once for a plan, and whose it is.

use std::collections::{BTreeMap, BTreeSet};

use xenvault_xenapi::{Session, task, vbd, vdi, vm};

use crate::EngineError;
use crate::marks::{self, Candidate, NotOurs, Owned};
use crate::pool::{Doing as _, server_time, the_pool};
use crate::state::{Made, Publication, RunHistory};

/// VMs, disks and VBDs of one pool at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inventory {
    pub(crate) pool: String,
    /// Server time, seconds since 1970.
    pub(crate) now: u64,
    pub(crate) vms: BTreeMap<vm::Ref, vm::Record>,
    pub(crate) vdis: BTreeMap<vdi::Ref, vdi::Record>,
    pub(crate) vbds: BTreeMap<vbd::Ref, vbd::Record>,
    pub(crate) tasks: BTreeMap<task::Ref, task::Record>,
}

/// What is known about a run beside the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunFacts {
    pub(crate) alive: bool,
    pub(crate) publication: Publication,
    pub(crate) created: BTreeSet<(Made, String)>,
    pub(crate) intended: BTreeSet<(Made, String)>,
    pub(crate) vm: Option<String>,
    /// Whether it made a VM, and no backup.
    pub(crate) restore: bool,
}

impl RunFacts {
    /// A run without a journal: it ended, and whatever it left was left on purpose or by accident.
    pub(crate) fn unknown() -> Self {
        Self {
            alive: false,
            publication: Publication::No,
            created: BTreeSet::new(),
            intended: BTreeSet::new(),
            vm: None,
            restore: false,
        }
    }

    /// A run that is alive somewhere.
    pub(crate) fn living() -> Self {
        Self { alive: true, ..Self::unknown() }
    }
}

impl From<&RunHistory> for RunFacts {
    fn from(history: &RunHistory) -> Self {
        Self {
            alive: false,
            publication: history.publication,
            created: history.alive.clone(),
            intended: history.intended.clone(),
            vm: history.operation.as_ref().map(|operation| operation.vm.clone()),
            restore: history.is_restore(),
        }
    }
}

impl Inventory {
    /// Reads everything. Any failure fails the whole: nothing is ever concluded from an incomplete list.
    pub(crate) async fn read(session: &Session) -> Result<Self, EngineError> {
        let pool = the_pool(session).await?;
        let now = server_time(session, &pool).await?;
        Ok(Self {
            now,
            pool: pool.uuid,
            vms: vm::get_all_records(session).await.doing("list the VMs")?,
            vdis: vdi::get_all_records(session).await.doing("list the disks")?,
            vbds: vbd::get_all_records(session).await.doing("list the VBDs")?,
            tasks: task::get_all_records(session).await.doing("list the tasks")?,
        })
    }

    /// Whose a VM (or the record of a snapshot) is.
    pub(crate) fn judge_vm(
        &self,
        record: &vm::Record,
        instance: &str,
        runs: &BTreeMap<String, RunFacts>,
    ) -> Result<Owned, NotOurs> {
        let candidate = Candidate {
            uuid: &record.uuid,
            name: &record.name_label,
            other_config: &record.other_config,
            is_a_snapshot: record.is_a_snapshot,
            in_journal: is_ours(runs, Made::Vm, &record.uuid, &record.name_label),
            foreign_user: false,
        };
        if record.is_control_domain || record.is_default_template {
            return Err(NotOurs::Unmarked);
        }
        let mut owned = match marks::judge(&candidate, instance) {
            Err(NotOurs::Unmarked) => from_journal(runs, Made::Vm, &record.uuid).ok_or(NotOurs::Unmarked)?,
            other => other?,
        };
        if owned.vm.is_none() {
            owned.vm = self.vms.get(&record.snapshot_of).map(|source| source.uuid.clone());
        }
        Ok(owned)
    }

    /// Whose a disk is. Disks of a snapshot that is ours are ours, also before they have marks.
    pub(crate) fn judge_vdi(
        &self,
        record: &vdi::Record,
        instance: &str,
        runs: &BTreeMap<String, RunFacts>,
    ) -> Result<Owned, NotOurs> {
        let users: Vec<&vm::Record> = self.users(record).collect();
        let by_users: Vec<Owned> = users.iter().filter_map(|user| self.judge_vm(user, instance, runs).ok()).collect();
        let foreign = users.iter().any(|user| !user.is_control_domain && self.judge_vm(user, instance, runs).is_err());
        let candidate = Candidate {
            uuid: &record.uuid,
            name: &record.name_label,
            other_config: &record.other_config,
            is_a_snapshot: record.is_a_snapshot,
            in_journal: is_ours(runs, Made::Vdi, &record.uuid, &record.name_label),
            foreign_user: foreign,
        };
        match marks::judge(&candidate, instance) {
            Err(why @ (NotOurs::Unmarked | NotOurs::CopiedMarks)) if !foreign => {
                // `VM.snapshot` of ours made it and our marks did not get on it any more, or its run noted it.
                let snapshot = users.iter().any(|user| user.is_a_snapshot);
                let from_snapshot = by_users
                    .into_iter()
                    .find(|_| record.is_a_snapshot && snapshot)
                    .map(|owner| Owned { role: None, ..owner });
                from_snapshot.or_else(|| from_journal(runs, Made::Vdi, &record.uuid)).ok_or(why)
            }
            other => other,
        }
    }

    /// The VMs that have a VBD on a disk.
    pub(crate) fn users(&self, record: &vdi::Record) -> impl Iterator<Item = &vm::Record> {
        record.vbds.iter().filter_map(|vbd| self.vbds.get(vbd)).filter_map(|vbd| self.vms.get(&vbd.vm))
    }
}

/// Whether a journal says that we made the object, or were going to under that name (which carries our run).
fn is_ours(runs: &BTreeMap<String, RunFacts>, what: Made, id: &str, name: &str) -> bool {
    runs.values().any(|facts| {
        // A backup makes snapshots only; what is none and bears the name of one was made from it by somebody else.
        let intended = facts.restore && facts.intended.contains(&(what, name.to_owned()));
        intended || facts.created.contains(&(what, id.to_owned()))
    })
}

/// The owner of an object without marks whose creation a run noted.
fn from_journal(runs: &BTreeMap<String, RunFacts>, what: Made, id: &str) -> Option<Owned> {
    let (run, facts) = runs.iter().find(|(_, facts)| facts.created.contains(&(what, id.to_owned())))?;
    Some(Owned { run: run.clone(), role: None, vm: facts.vm.clone(), repository: None, resume_until: None })
}
