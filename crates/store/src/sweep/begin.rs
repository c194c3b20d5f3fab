//! The first half of a sweep: what goes, and its announcement.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use xenvault_store_format::{
    DamageMark, ForgottenPoint, MAX_CONDEMNED_PACKS, MAX_FORGOTTEN_POINTS, PackId, RecordId, SweepIntent, Undo,
    encode_record,
};

use super::survey::{Survey, confirm};
use super::{SweepBegun, SweepOptions, SweepReport};
use crate::heal::check_point;
use crate::mark::{Marks, Tally};
use crate::monitor::MaintenanceStage;
use crate::points::Point;
use crate::promise::{is_held, is_promised};
use crate::publish::write_receipt;
use crate::repository::Inner;
use crate::sweeps::SweepState;
use crate::{StoreError, names, records};

/// Finds what goes, and announces it. Says whether there is anything to be carried out.
pub(super) async fn first_half(
    repository: &Arc<Inner>,
    state: &SweepState,
    options: &SweepOptions,
    report: &mut SweepReport,
) -> Result<bool, StoreError> {
    repository.bar_copies(state).await?;
    let survey = Survey::take(repository, None, options).await?;
    let going = going(repository, &survey, options, report).await?;
    // After the points: every chunk that they refer to was there before them.
    repository.index.refresh(&*repository.backend, &repository.keys).await?;
    repository.index.read_all(&*repository.backend, &repository.keys).await?;
    let mut marks = Marks::new(repository.index.snapshot());
    let ids: BTreeSet<_> = going.iter().map(|point| point.point).collect();
    let unconfirmed = survey.mark(repository, &mut marks, &ids, options).await?;
    report.points = (survey.points.len() - ids.len()) as u64;
    if !options.dry_run {
        confirm(repository, unconfirmed.in_time, state.number).await?;
    }
    release(repository, state, unconfirmed.late, options, report).await?;

    let tallies = marks.tallies();
    let condemned = condemn(repository, state, &marks, &tallies, options).await?;
    let stale_records = stale(repository, &survey, &tallies).await?;
    let sum = |value: fn(&Tally) -> u64| -> u64 { condemned.iter().filter_map(|id| tallies.get(id)).map(value).sum() };
    let begun = SweepBegun {
        number: state.number + 1,
        points: going.iter().map(|point| point.point).collect(),
        packs: condemned.len() as u64,
        bytes: sum(|tally| tally.total_bytes),
        carry_bytes: sum(|tally| tally.live_bytes),
        records: stale_records.len() as u64,
    };
    let is_news = |id: &PackId| !state.is_condemned(id) || tallies.get(id).is_none_or(|tally| tally.live_bytes == 0);
    let nothing = going.is_empty() && stale_records.is_empty() && !condemned.iter().any(is_news);
    if nothing || options.dry_run {
        if !nothing {
            report.begun = Some(begun);
        }
        if !options.dry_run {
            let gone = lost_for_good(&marks, &tallies);
            options.monitor.tell(MaintenanceStage::Index, 0, 0, 0);
            report.replaced_segments += repository.index.tidy(&*repository.backend, &repository.keys, &gone).await?;
        }
        return Ok(false);
    }
    let intent = SweepIntent {
        number: state.number + 1,
        created_unix_ms: records::unix_ms(),
        grace_seconds: options.grace.as_secs(),
        forgotten: going,
        condemned: condemned.into_iter().collect(),
        stale_records,
    };
    announce(repository, &intent).await?;
    report.begun = Some(begun);
    Ok(true)
}

/// Points with a tombstone.
async fn going(
    repository: &Inner,
    survey: &Survey,
    options: &SweepOptions,
    report: &mut SweepReport,
) -> Result<Vec<ForgottenPoint>, StoreError> {
    let mut seen = HashSet::new();
    let mut going = Vec::new();
    for (_, tombstone) in &survey.tombstones.valid {
        let Some(name) = survey.points.get(&tombstone.point) else { continue };
        if seen.insert(tombstone.point) {
            if is_promised(repository, name).await? || is_held(repository, name).await? {
                report.promised.push(tombstone.point);
                continue;
            }
            going.push(ForgottenPoint {
                point: tombstone.point,
                pool_uuid: tombstone.pool_uuid.clone(),
                vm_uuid: tombstone.vm_uuid.clone(),
                tombstone: tombstone.id,
            });
        }
    }
    let (count, total) = (going.len(), survey.points.len());
    if count.saturating_mul(5) > total && !options.confirm_many {
        return Err(StoreError::TooManyPoints { going: count, total });
    }
    going.truncate(MAX_FORGOTTEN_POINTS);
    Ok(going)
}

/// Looks for every chunk of the points that nobody saw to their end.
async fn release(
    repository: &Arc<Inner>,
    state: &SweepState,
    late: Vec<Point>,
    options: &SweepOptions,
    report: &mut SweepReport,
) -> Result<(), StoreError> {
    for point in late {
        match check_point(repository, &point, None).await {
            Ok(_) => {
                if !options.dry_run {
                    write_receipt(repository, &point, state.number).await?;
                }
                report.released.push(point.id);
            }
            Err(error) if error.is_loss() => {
                tracing::warn!(point = %point.id, error = %error, "a point is not complete and stays in quarantine");
                report.quarantined.push(point.id);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Packs that go: those that the sweep before has kept, those of which nothing is needed, and of those of which little
/// is, as many as the budget allows, beginning with the least.
async fn condemn(
    repository: &Arc<Inner>,
    state: &SweepState,
    marks: &Marks,
    tallies: &HashMap<PackId, Tally>,
    options: &SweepOptions,
) -> Result<BTreeSet<PackId>, StoreError> {
    let backend = &repository.backend;
    let now = backend.now().await.map_err(|error| StoreError::io("ask for the time of", "the store", error))?;
    let mut condemned: BTreeSet<PackId> = state.condemned().copied().collect();
    let share = u64::from(options.rewrite_below_percent.min(100));
    let is_little = |tally: &Tally| tally.live_bytes.saturating_mul(100) < tally.total_bytes.saturating_mul(share);
    let mut candidates: Vec<(u64, PackId)> = tallies
        .iter()
        .filter(|(id, tally)| (tally.live_bytes == 0 || is_little(tally)) && !marks.loaded.lost.contains(id))
        .map(|(id, tally)| (tally.live_bytes, *id))
        .collect();
    candidates.sort_unstable();
    let mut budget = options.rewrite_budget_bytes;
    for (live_bytes, id) in candidates {
        if condemned.len() >= MAX_CONDEMNED_PACKS || live_bytes > budget {
            break;
        }
        if condemned.contains(&id) || !is_old(repository, &id, now, options).await? {
            continue;
        }
        budget -= live_bytes;
        condemned.insert(id);
    }
    Ok(condemned)
}

/// Whether a pack is older than the grace period: the writer of a younger one may be at work.
async fn is_old(repository: &Inner, id: &PackId, now: SystemTime, options: &SweepOptions) -> Result<bool, StoreError> {
    let name = names::pack(id);
    match repository.backend.modified(&name).await {
        // One that is locked can not be removed anyway, and is better used again until then.
        Ok(appeared) => {
            Ok(now.duration_since(appeared).unwrap_or_default() >= options.grace && !is_held(repository, &name).await?)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StoreError::io("ask for the time of", &name, error)),
    }
}

/// Records that nobody needs any more, by their names below `records/`, in the order in which they have to go.
///
/// A receipt goes before the tombstone that explains why its point is gone, and the undoing of a tombstone only when the
/// tombstone is gone for good: else a point would be forgotten that was taken back.
async fn stale(
    repository: &Inner,
    survey: &Survey,
    tallies: &HashMap<PackId, Tally>,
) -> Result<Vec<String>, StoreError> {
    let mut stale: Vec<String> = survey.spent_receipts.clone();
    // Whose receipt is still there is needed as its explanation, until the next sweep.
    let waits = |point| survey.spent_receipts.iter().any(|name| names::receipt_point(name) == Some(point));
    let spent = survey.tombstones.valid.iter().filter(|(_, tombstone)| !survey.points.contains_key(&tombstone.point));
    stale.extend(spent.filter(|(_, tombstone)| !waits(tombstone.point)).map(|(name, _)| name.clone()));
    stale.extend(survey.tombstones.undone.iter().map(|(name, _)| name.clone()));
    let known: HashSet<RecordId> = {
        let valid = survey.tombstones.valid.iter().map(|(_, tombstone)| tombstone.id);
        valid.chain(survey.tombstones.undone.iter().map(|(_, id)| *id)).collect()
    };
    for (name, undo) in records::read_all::<Undo>(repository, names::UNDONE).await? {
        let Ok(undo) = undo else { continue };
        let tombstone = names::tombstone(&undo.point, &undo.tombstone);
        if !known.contains(&undo.tombstone) && !records::exists(repository, &tombstone).await? {
            stale.push(name);
        }
    }
    for (name, mark) in records::read_all::<DamageMark>(repository, names::DAMAGE).await? {
        let Ok(mark) = mark else { continue };
        let mut packs = mark.packs.iter().chain(mark.copies.iter().map(|copy| &copy.pack));
        let mut needed = false;
        while let Some(pack) = packs.next().filter(|_| !needed) {
            needed = tallies.contains_key(pack) || records::exists(repository, &names::pack(pack)).await?;
        }
        if !needed {
            stale.push(name);
        }
    }
    let mut free = Vec::new();
    for name in stale {
        if free.len() >= MAX_FORGOTTEN_POINTS {
            break;
        }
        if !is_held(repository, &name).await? {
            free.push(name);
        }
    }
    let stale = free;
    let below = |name: String| name.strip_prefix(names::RECORDS).map(|rest| rest.trim_start_matches('/').to_owned());
    Ok(stale.into_iter().filter_map(below).collect())
}

/// Packs that the index names, that are not there, and of which nothing is needed.
pub(super) fn lost_for_good(marks: &Marks, tallies: &HashMap<PackId, Tally>) -> HashSet<PackId> {
    let unneeded = |id: &&PackId| tallies.get(id).is_none_or(|tally| tally.live_bytes == 0);
    marks.loaded.lost.iter().filter(unneeded).copied().collect()
}

/// Writes the intent, and makes sure that it is ours.
async fn announce(repository: &Inner, intent: &SweepIntent) -> Result<(), StoreError> {
    let name = names::intent(intent.number);
    let bytes = encode_record(&repository.keys, intent).map_err(|error| StoreError::format(&name, error))?;
    let bytes = Bytes::from(bytes);
    match repository.backend.put_new(&name, bytes.clone()).await {
        // Whose it is shows when it is read: where versions are kept, it can be something without a meaning.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        written => written.map_err(|error| StoreError::io("write", &name, error))?,
    }
    let read = match records::read_with_bytes::<SweepIntent>(repository, &name).await {
        Err(error) if error.is_loss() => return Err(StoreError::SweepTaken { number: intent.number }),
        read => read?.1,
    };
    if read == bytes { Ok(()) } else { Err(StoreError::SweepTaken { number: intent.number }) }
}
