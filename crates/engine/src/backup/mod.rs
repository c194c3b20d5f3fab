//! Backup of one VM.

mod finding;
mod request;

pub use finding::{Finding, FindingKind};
pub use request::{BackupReport, BackupRequest, DiskReport, Level, LevelRequest, SkippedDevice, VmSelector};

use crate::{Engine, EngineError};

pub(crate) async fn run(_engine: &Engine, _request: BackupRequest) -> Result<BackupReport, EngineError> {
    todo!()
}
