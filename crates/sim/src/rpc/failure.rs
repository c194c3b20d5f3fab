//! A XenAPI failure: a code and its parameters.

use crate::storage::SrError;

/// A failed call. It travels as an ordinary answer with HTTP status 200.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: String,
    pub(crate) params: Vec<String>,
}

/// What a method gives.
pub(crate) type Outcome<T = crate::model::Value> = Result<T, Failure>;

impl Failure {
    pub(crate) fn new<S: Into<String>>(code: &str, params: impl IntoIterator<Item = S>) -> Self {
        Self { code: code.to_owned(), params: params.into_iter().map(Into::into).collect() }
    }

    pub(crate) fn bare(code: &str) -> Self {
        Self { code: code.to_owned(), params: Vec::new() }
    }

    pub(crate) fn handle_invalid(class: &str, reference: &str) -> Self {
        Self::new("HANDLE_INVALID", [class, reference])
    }

    /// OCaml's `Failure` exception, as it gets through to a client.
    pub(crate) fn internal(message: &str) -> Self {
        let escaped = message.replace('\\', "\\\\").replace('"', "\\\"");
        Self::new("INTERNAL_ERROR", [format!("Failure(\"{escaped}\")")])
    }

    pub(crate) fn not_allowed(reason: impl Into<String>) -> Self {
        Self::new("OPERATION_NOT_ALLOWED", [reason.into()])
    }

    /// As xapi prints an API error in texts: `CODE: [ a; b ]`.
    pub(crate) fn text(&self) -> String {
        format!("{}: [ {} ]", self.code, self.params.join("; "))
    }

    /// Code first, as in `ErrorDescription` and `task.error_info`.
    pub(crate) fn description(&self) -> Vec<String> {
        std::iter::once(self.code.clone()).chain(self.params.iter().cloned()).collect()
    }
}

impl From<Failure> for crate::SimError {
    fn from(failure: Failure) -> Self {
        Self::Api { code: failure.code, params: failure.params }
    }
}

impl From<SrError> for Failure {
    fn from(error: SrError) -> Self {
        Self { code: error.code, params: error.params }
    }
}
