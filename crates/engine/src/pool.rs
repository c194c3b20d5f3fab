//! Small helpers around calls of the pool that every workflow needs.

use std::time::{Duration, Instant};

use xenvault_xenapi::{
    CancellationToken, ErrorCode, FailureClass, Session, XenApiError, host, host_metrics, pbd, pool, sr, task, tasks,
    vbd, vdi, vm,
};

use crate::state::{Entry, Journal, Made};
use crate::{EngineError, EngineOptions};

/// How often to look at a task where events do not come.
const TASK_POLL: Duration = Duration::from_millis(500);

/// Gives a failed call its place in the workflow.
pub(crate) trait Doing<T> {
    /// `action` completes "the pool failed to ...".
    fn doing(self, action: impl Into<String>) -> Result<T, EngineError>;
}

impl<T> Doing<T> for Result<T, XenApiError> {
    fn doing(self, action: impl Into<String>) -> Result<T, EngineError> {
        self.map_err(|source| EngineError::Pool { action: action.into(), source: Box::new(source) })
    }
}

/// The same for calls of the repository.
pub(crate) trait DoingInRepository<T> {
    /// `action` completes "the repository failed to ...".
    fn doing(self, action: impl Into<String>) -> Result<T, EngineError>;
}

impl<T> DoingInRepository<T> for Result<T, xenvault_store::StoreError> {
    fn doing(self, action: impl Into<String>) -> Result<T, EngineError> {
        self.map_err(|source| EngineError::Repository { action: action.into(), source: Box::new(source) })
    }
}

/// The error code of a failed call, if the pool answered with one.
pub(crate) fn code(error: &XenApiError) -> Option<&ErrorCode> {
    error.code()
}

/// Whether this server, its licence or its storage can not do what was asked: there may be another way.
pub(crate) fn is_unsupported(error: &XenApiError) -> bool {
    matches!(error, XenApiError::NotSupported(_))
}

/// Whether the object of a call does not exist (any more).
pub(crate) fn is_gone(error: &XenApiError) -> bool {
    matches!(code(error), Some(ErrorCode::HandleInvalid | ErrorCode::UuidInvalid))
}

/// Whether the pool says that something is in use at the moment.
pub(crate) fn is_busy(error: &XenApiError) -> bool {
    matches!(error.class(), Some(FailureClass::WhenFree | FailureClass::RetryNow))
}

/// Whether an SR had no space left.
pub(crate) fn is_full(error: &XenApiError) -> bool {
    let Some(failure) = error.api() else { return false };
    failure.code == ErrorCode::SrFull || matches!(failure.sr_backend_failure(), Some(44 | 129 | 180))
}

/// Turns "it is not there" into success: removing something twice is no failure.
pub(crate) fn gone_is_fine(result: Result<(), XenApiError>) -> Result<(), XenApiError> {
    match result {
        Err(error) if is_gone(&error) => Ok(()),
        other => other,
    }
}

/// SR types whose disks are VHD files, or volumes with a VHD inside.
const VHD_TYPES: [&str; 9] = ["ext", "nfs", "smb", "cifs", "file", "lvm", "lvmoiscsi", "lvmohba", "lvmofcoe"];

/// Whether a disk is kept as a VHD: it has an allocation map, and where it was never written it reads as zeros.
pub(crate) fn keeps_vhds(sr: &sr::Record, disk: &vdi::Record) -> bool {
    let said = |key: &str, other: &str| disk.sm_config.get(key).is_some_and(|format| format != other);
    VHD_TYPES.contains(&sr.type_.as_str()) && !said("type", "vhd") && !said("image-format", "vhd")
}

/// The pool's reference and record.
pub(crate) async fn the_pool(session: &Session) -> Result<pool::Record, EngineError> {
    let all = pool::get_all_records(session).await.doing("read the pool's record")?;
    all.into_values().next().ok_or_else(|| EngineError::Internal { what: "the pool has no pool record".into() })
}

/// Server time, seconds since 1970: ages and deadlines on objects of the pool are measured with its own clock.
pub(crate) async fn server_time(session: &Session, pool: &pool::Record) -> Result<u64, EngineError> {
    let time = host::get_servertime(session, &pool.master).await.doing("tell the time")?;
    Ok(u64::try_from(time.unix_seconds()).unwrap_or(0))
}

/// Whether a host lives by the pool's records. One that can not be looked at is not taken for dead.
pub(crate) async fn is_live(session: &Session, host: &host::Ref) -> bool {
    let live = async {
        let metrics = host::get_metrics(session, host).await?;
        Ok::<_, XenApiError>(host_metrics::get_record(session, &metrics).await?.live)
    };
    live.await.unwrap_or(true)
}

/// Awaits a task that a journal knows about from its first moment, so that a crash leaves no unknown task behind. The
/// work ends in nothing if one of these hosts dies (X06); they were looked at before the call.
pub(crate) async fn await_task_on<T: tasks::FromTaskResult>(
    session: &Session,
    journal: &Journal,
    options: &EngineOptions,
    operation: &str,
    hosts: tasks::HostLives,
    started: Result<task::Ref, XenApiError>,
) -> Result<T, XenApiError> {
    let task = started?;
    let id = task.as_str().to_owned();
    // A journal that can not be written any more is noticed at the next intent; the task is destroyed here anyway.
    let _ = journal.write(&Entry::Created { what: Made::Task, id: id.clone() });
    let wait = tasks::WaitOptions {
        progress_deadline: options.task_progress_deadline,
        poll: TASK_POLL,
        hosts,
        ..tasks::WaitOptions::of(operation)
    };
    // Dropping the future cancels the task, so that no token is needed.
    let result = tasks::wait::<T>(session, task, wait, &CancellationToken::new()).await;
    // One that was given up without its end may still be there, and at work: whoever cleans up waits for it.
    if !matches!(&result, Err(error) if error.is_silence() || matches!(error, XenApiError::SessionInvalid { .. })) {
        let _ = journal.write(&Entry::Removed { what: Made::Task, id });
    }
    result
}

/// So often something is done whose answer was lost.
const LOST_ATTEMPTS: u32 = 4;

/// Does what is harmless to do twice, again while its answer is lost: a coordinator that moved, a toolstack that was
/// restarted, a host that died under a task. Each attempt waits for the pool to come back by itself.
pub(crate) async fn until_answered<T, F, Fut>(mut act: F) -> Result<T, XenApiError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, XenApiError>>,
{
    let mut attempt = 1;
    loop {
        match act().await {
            Err(error) if error.is_lost_answer() && attempt < LOST_ATTEMPTS => {
                tracing::info!(%error, attempt, "the answer was lost; the call is made again");
            }
            other => return other,
        }
        tokio::time::sleep(Duration::from_millis(250 << attempt)).await;
        attempt += 1;
    }
}

/// The hosts without which nothing can be done with disks of this SR: its only one, if there is only one (X06).
pub(crate) async fn only_hosts(session: &Session, sr: &sr::Record) -> tasks::HostLives {
    let [only] = sr.pbds.as_slice() else { return tasks::HostLives::default() };
    match pbd::get_record(session, only).await {
        Ok(pbd) => tasks::host_lives(session, &[pbd.host]).await,
        Err(_) => tasks::HostLives::default(),
    }
}

/// Waits until no control domain has the disk attached: the host removes its VBD some time after NBD was closed (U07).
///
/// Returns `false` if one is still there after `limit`.
pub(crate) async fn wait_detached(session: &Session, disk: &vdi::Ref, limit: Duration) -> Result<bool, XenApiError> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(50);
    loop {
        if !is_attached_to_control_domain(session, disk).await? {
            return Ok(true);
        }
        if Instant::now() + pause > deadline {
            return Ok(false);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

async fn is_attached_to_control_domain(session: &Session, disk: &vdi::Ref) -> Result<bool, XenApiError> {
    let vbds = match vdi::get_vbds(session, disk).await {
        Err(error) if is_gone(&error) => return Ok(false),
        other => other?,
    };
    for vbd in &vbds {
        // A VBD or VM that vanishes between two calls is what is waited for.
        let user = match vbd::get_vm(session, vbd).await {
            Err(error) if is_gone(&error) => continue,
            other => other?,
        };
        match vm::get_is_control_domain(session, &user).await {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// So often something is done again that failed because a host or a path to storage was away.
const ABSENCES: u32 = 3;

/// Does something that needs the disk to be free, again and again while it is busy, for at most `limit`, and a few times
/// while a host is away.
pub(crate) async fn while_busy<T, F, Fut>(limit: Duration, mut act: F) -> Result<T, XenApiError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, XenApiError>>,
{
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(100);
    let mut absences = 0;
    loop {
        match act().await {
            Err(error) if is_busy(&error) && Instant::now() + pause < deadline => {}
            // A host is away for a moment.
            Err(error) if error.class() == Some(FailureClass::Later) && absences < ABSENCES => {
                absences += 1;
                pause = pause.max(Duration::from_secs(1));
            }
            other => return other,
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(3));
    }
}
