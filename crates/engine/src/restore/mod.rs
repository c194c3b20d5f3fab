//! Restore of one VM as a new VM.

mod request;

pub use request::{
    MacPolicy, NotRestored, RestoreReport, RestoreRequest, RestoredDisk, RestoredVif, SrSelector,
};

use crate::{Engine, EngineError};

pub(crate) async fn run(_engine: &Engine, _request: RestoreRequest) -> Result<RestoreReport, EngineError> {
    todo!()
}
