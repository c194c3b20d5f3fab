//! One call on its way: who calls, with which parameters, under which task.

use std::sync::Arc;

use crate::core::{Core, HostNode};
use crate::model::Value;
use crate::rpc::Outcome;

/// A checked call: the session is good and the parameters have their types.
pub(crate) struct Call {
    pub(crate) core: Arc<Core>,
    /// Index of the host that was asked.
    pub(crate) host: usize,
    /// The session's reference, a secret.
    pub(crate) session: String,
    /// `VM.snapshot`, without `Async.`.
    pub(crate) method: String,
    pub(crate) params: Vec<Value>,
    /// The task's reference; one that is not in the database for a plain call.
    pub(crate) task: String,
}

impl Call {
    /// A parameter's text.
    pub(crate) fn text(&self, index: usize) -> &str {
        self.params.get(index).map_or("", Value::as_str)
    }

    pub(crate) fn int(&self, index: usize) -> i64 {
        self.params.get(index).map_or(0, Value::as_int)
    }

    pub(crate) fn flag(&self, index: usize) -> bool {
        self.params.get(index).is_some_and(Value::as_bool)
    }

    pub(crate) fn value(&self, index: usize) -> Value {
        self.params.get(index).cloned().unwrap_or_else(Value::void)
    }

    /// The strings of a list parameter; empty if it was left out.
    pub(crate) fn strings(&self, index: usize) -> Vec<String> {
        self.params.get(index).map(Value::strings).unwrap_or_default()
    }

    /// The host that was asked.
    pub(crate) fn node(&self) -> Outcome<&HostNode> {
        self.core.host_at(self.host)
    }
}
