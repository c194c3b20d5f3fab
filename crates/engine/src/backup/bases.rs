//! Our bases of a disk: finding them, and removing those that nothing can be counted from any more.

use xenvault_xenapi::{XenApiError, vdi};

use crate::marks::{self, Candidate, NotOurs, Owned, Role};
use crate::pool::{gone_is_fine, is_gone};
use crate::run::Run;

/// A base of this installation, whichever VM and repository it serves. None of a run that is alive.
pub(crate) struct OurBase {
    pub(crate) reference: vdi::Ref,
    pub(crate) owned: Owned,
}

/// Every snapshot of `disk` with what its marks say. One that goes meanwhile is left out.
async fn snapshots(
    run: &Run,
    disk: &vdi::Ref,
) -> Result<Vec<(vdi::Ref, vdi::Record, Result<Owned, NotOurs>)>, XenApiError> {
    let session = run.session();
    let mut found = Vec::new();
    for reference in vdi::get_record(session, disk).await?.snapshots {
        let record = match vdi::get_record(session, &reference).await {
            Err(error) if is_gone(&error) => continue,
            other => other?,
        };
        let candidate = Candidate {
            uuid: &record.uuid,
            name: &record.name_label,
            other_config: &record.other_config,
            is_a_snapshot: record.is_a_snapshot,
            in_journal: false,
            foreign_user: !record.vbds.is_empty(),
        };
        let owned = marks::judge(&candidate, run.engine.instance());
        found.push((reference, record, owned));
    }
    Ok(found)
}

/// All bases of ours among the snapshots of `disk`. What other products or people made is never among them (X21).
///
/// # Errors
/// If the disk or one of its snapshots can not be read.
pub(crate) async fn ours(run: &Run, disk: &vdi::Ref) -> Result<Vec<OurBase>, XenApiError> {
    let found = snapshots(run, disk).await?.into_iter();
    let ours = found.filter_map(|(reference, _, owned)| Some(OurBase { reference, owned: owned.ok()? }));
    let is_free = |base: &OurBase| base.owned.role == Some(Role::Base) && !run.engine.state().is_alive(&base.owned.run);
    Ok(ours.filter(is_free).collect())
}

/// The UUID of a snapshot of `disk` that is tracked and not ours.
///
/// # Errors
/// As [`ours`].
pub(crate) async fn tracked_by_others(run: &Run, disk: &vdi::Ref) -> Result<Option<String>, XenApiError> {
    let found = snapshots(run, disk).await?;
    Ok(found
        .into_iter()
        .find(|(_, record, owned)| record.cbt_enabled && owned.is_err())
        .map(|(_, record, _)| record.uuid))
}

/// Removes all our bases of a disk whose tracking is off, before it is switched on again.
///
/// With the log of the live disk gone they are good for nothing, and they do harm: after a crash the pool drops that log
/// without telling the newest base's log, which goes on naming the live disk as its successor. Were the base removed
/// after tracking is on again, the pool would join its neighbours and so cut the new log off from its snapshots; every
/// later listing would be "unrelated".
pub(crate) async fn remove_useless(run: &Run, device: &str, disk: &vdi::Ref) {
    let failed = |error: &XenApiError| {
        let text =
            format!("disk {device}: a base without a use could not be removed ({error}); the next sweep tries again");
        run.meter.warn("not-cleaned-up", text);
    };
    match ours(run, disk).await {
        Ok(bases) => {
            for base in bases {
                if let Err(error) = gone_is_fine(vdi::destroy(run.session(), &base.reference).await) {
                    failed(&error);
                }
            }
        }
        Err(error) => failed(&error),
    }
}
