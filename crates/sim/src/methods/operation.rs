//! Operations in progress: they stand in `current_operations` and keep others out.

use std::sync::Arc;
use std::time::Duration;

use super::Call;
use crate::core::Core;
use crate::model::Database;
use crate::rpc::Outcome;

/// How long xapi waits for another operation to end.
const PATIENCE: Duration = Duration::from_secs(2 * 3600);

/// An operation in progress; it ends when this is dropped.
pub(crate) struct Operation {
    core: Arc<Core>,
    entries: Vec<(&'static str, String, String)>,
}

impl Operation {
    /// Waits until nothing else is in the way, checks, and marks every object with the operation.
    pub(crate) async fn begin(
        call: &Call,
        objects: &[(&'static str, &str, &str)],
        mut check: impl FnMut(&Database) -> Outcome<()>,
    ) -> Outcome<Self> {
        Self::begin_as(&call.core, &call.task, objects, |db| check(db)).await
    }

    /// The same under any task.
    pub(crate) async fn begin_as(
        core: &Arc<Core>,
        task: &str,
        objects: &[(&'static str, &str, &str)],
        mut check: impl FnMut(&Database) -> Outcome<()>,
    ) -> Outcome<Self> {
        let mark = |db: &mut Database| {
            check(db)?;
            for (class, reference, operation) in objects {
                db.put(class, reference, "current_operations", task, *operation);
            }
            Ok(())
        };
        core.retry(PATIENCE, mark).await?;
        let entry =
            |(class, reference, _): &(&'static str, &str, &str)| (*class, (*reference).to_owned(), task.to_owned());
        Ok(Self { core: Arc::clone(core), entries: objects.iter().map(entry).collect() })
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let mut db = self.core.db();
        for (class, reference, task) in &self.entries {
            db.take(class, reference, "current_operations", task);
        }
    }
}
