//! What a service of objects answers when it does not do what it was asked, as a person needs to know it.
//!
//! The library above tells little more than "generic error", so the answers themselves are looked at (`courier.rs`).

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// Why a request to a bucket failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BucketFault {
    /// Nobody answers to this access key.
    #[error("the object store does not know the access key ({said}): check it, and that the endpoint is the right one")]
    UnknownKey {
        /// The answer.
        said: Answer,
    },
    /// The signature is not right.
    #[error("the secret key does not belong to the access key ({said}): check it, and the region")]
    WrongSecret {
        /// The answer.
        said: Answer,
    },
    /// The keys are right, and may not do this.
    #[error("the object store refuses this to the given keys ({said}): check what their policy allows in this bucket")]
    Denied {
        /// The answer.
        said: Answer,
    },
    /// There is no such bucket.
    #[error("there is no such bucket ({said}): check its name, or make it; a repository does not make buckets")]
    NoBucket {
        /// The answer.
        said: Answer,
    },
    /// The signature's time is too far from the service's.
    #[error("the clocks of this machine and of the object store differ too much ({said}): set this machine's clock")]
    Clock {
        /// The answer.
        said: Answer,
    },
    /// The certificate is not to be trusted, or there is no TLS at all.
    #[error("no trusted connection to the object store: {said}; give its authority if it is not a public one")]
    Tls {
        /// What TLS says.
        said: String,
    },
    /// Nobody answers.
    #[error("the object store can not be reached: {said}")]
    Unreachable {
        /// What the network says.
        said: String,
    },
    /// The connection broke or fell silent.
    #[error("the connection to the object store broke: {said}")]
    Broken {
        /// What the network says.
        said: String,
    },
    /// The service has too much to do, or fails.
    #[error("the object store is busy or fails ({said})")]
    Busy {
        /// The answer.
        said: Answer,
    },
    /// There is no more room for this account.
    #[error("the object store has no more room for this account ({said})")]
    Quota {
        /// The answer.
        said: Answer,
    },
    /// The object is not there.
    #[error("there is no such object ({said})")]
    NoObject {
        /// The answer.
        said: Answer,
    },
    /// There is such an object already.
    #[error("there is such an object already ({said})")]
    Exists {
        /// The answer.
        said: Answer,
    },
    /// The service does not know this kind of request.
    #[error("the object store does not know this request ({said})")]
    Unsupported {
        /// The answer.
        said: Answer,
    },
    /// A range beyond the end of the object.
    #[error("the object is shorter ({said})")]
    Range {
        /// The answer.
        said: Answer,
    },
    /// Anything else that was answered.
    #[error("the object store answers {said}")]
    Other {
        /// The answer.
        said: Answer,
    },
    /// The answer is none that can be understood.
    #[error("the answer of the object store can not be understood: {said}")]
    Strange {
        /// What is strange.
        said: String,
    },
}

/// Status, code and message of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Number of the HTTP status.
    pub status: u16,
    /// The service's own word, such as `AccessDenied`; empty if it gave none.
    pub code: String,
    /// Its text for people, cut short.
    pub message: String,
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.status)?;
        for part in [&self.code, &self.message].into_iter().filter(|part| !part.is_empty()) {
            write!(f, " {part}")?;
        }
        Ok(())
    }
}

impl Answer {
    /// Reads the XML of an error, in the dialect that all such services speak. What is not there stays empty.
    pub(in crate::backend) fn read(status: u16, body: &[u8]) -> Self {
        const LONGEST: usize = 300;
        let text = String::from_utf8_lossy(body.get(..body.len().min(16 * 1024)).unwrap_or_default());
        let element = |name: &str| {
            let (_, rest) = text.split_once(&format!("<{name}>"))?;
            let (found, _) = rest.split_once(&format!("</{name}>"))?;
            Some(found.chars().filter(|letter| !letter.is_control()).take(LONGEST).collect())
        };
        Self { status, code: element("Code").unwrap_or_default(), message: element("Message").unwrap_or_default() }
    }
}

/// What happened on the wire to one request of the library above.
#[derive(Clone, Debug)]
pub(in crate::backend) enum Event {
    /// An answer that is no success.
    Answered(Answer),
    /// No answer.
    Tls(String),
    Unreachable(String),
    Broken(String),
}

/// What was last heard in one attempt.
#[derive(Clone, Debug, Default)]
pub(in crate::backend) struct Heard(Arc<Mutex<Option<Event>>>);

impl Heard {
    pub(super) fn note(&self, event: Event) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(event);
    }

    fn take(&self) -> Option<Event> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl BucketFault {
    /// The fault behind an error of the library.
    pub(in crate::backend) fn of(error: object_store::Error, heard: &Heard) -> Self {
        match heard.take() {
            Some(Event::Answered(said)) => Self::of_answer(said),
            Some(Event::Tls(said)) => Self::Tls { said },
            Some(Event::Unreachable(said)) => Self::Unreachable { said },
            Some(Event::Broken(said)) => Self::Broken { said },
            None => Self::of_library(&error),
        }
    }

    /// What the library says without having asked, or about an answer that was a success; and stores behind it that send
    /// nothing.
    fn of_library(error: &object_store::Error) -> Self {
        use object_store::Error;
        let said = |status| Answer { status, code: String::new(), message: error.to_string() };
        match error {
            Error::NotFound { .. } => Self::NoObject { said: said(404) },
            Error::AlreadyExists { .. } | Error::Precondition { .. } => Self::Exists { said: said(412) },
            Error::PermissionDenied { .. } => Self::Denied { said: said(403) },
            Error::Unauthenticated { .. } => Self::Denied { said: said(401) },
            Error::NotSupported { .. } | Error::NotImplemented { .. } => Self::Unsupported { said: said(501) },
            _ => Self::Strange { said: error.to_string() },
        }
    }

    pub(in crate::backend) fn of_answer(said: Answer) -> Self {
        // The service's word first: several of them share a status.
        match said.code.as_str() {
            "InvalidAccessKeyId" | "InvalidClientTokenId" => return Self::UnknownKey { said },
            "SignatureDoesNotMatch" | "AuthorizationHeaderMalformed" => return Self::WrongSecret { said },
            "RequestTimeTooSkewed" | "RequestExpired" => return Self::Clock { said },
            "NoSuchBucket" => return Self::NoBucket { said },
            "QuotaExceeded" | "QuotaExceededException" => return Self::Quota { said },
            "SlowDown"
            | "RequestTimeout"
            | "ServiceUnavailable"
            | "InternalError"
            | "OperationAborted"
            | "ConditionalRequestConflict"
            | "XMinioServerNotInitialized" => return Self::Busy { said },
            _ => {}
        }
        match said.status {
            401 | 403 => Self::Denied { said },
            404 => Self::NoObject { said },
            // A conflict without a word of its own is one of requests at the same time.
            408 | 409 | 425 | 429 | 500 | 502..=504 => Self::Busy { said },
            412 | 304 => Self::Exists { said },
            416 => Self::Range { said },
            405 | 501 => Self::Unsupported { said },
            507 => Self::Quota { said },
            _ => Self::Other { said },
        }
    }

    /// Whether the same request can succeed in a moment.
    pub(in crate::backend) fn may_pass(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::Unreachable { .. } | Self::Broken { .. } | Self::Strange { .. })
    }

    /// Whether somebody has to do something first.
    pub fn is_lasting(&self) -> bool {
        !matches!(self, Self::Quota { .. } | Self::Other { .. }) && !self.may_pass()
    }

    /// The service's own word; empty if it gave none.
    pub(in crate::backend) fn code(&self) -> &str {
        match self {
            Self::UnknownKey { said }
            | Self::WrongSecret { said }
            | Self::Denied { said }
            | Self::NoBucket { said }
            | Self::Clock { said }
            | Self::Busy { said }
            | Self::Quota { said }
            | Self::NoObject { said }
            | Self::Exists { said }
            | Self::Unsupported { said }
            | Self::Range { said }
            | Self::Other { said } => &said.code,
            Self::Tls { .. } | Self::Unreachable { .. } | Self::Broken { .. } | Self::Strange { .. } => "",
        }
    }

    /// The kind that the repository tells apart.
    pub(in crate::backend) fn kind(&self) -> io::ErrorKind {
        match self {
            Self::UnknownKey { .. } | Self::WrongSecret { .. } | Self::Denied { .. } | Self::Clock { .. } => {
                io::ErrorKind::PermissionDenied
            }
            Self::NoObject { .. } => io::ErrorKind::NotFound,
            Self::Exists { .. } => io::ErrorKind::AlreadyExists,
            Self::Unsupported { .. } => io::ErrorKind::Unsupported,
            Self::Range { .. } => io::ErrorKind::UnexpectedEof,
            Self::Quota { .. } => io::ErrorKind::QuotaExceeded,
            Self::Unreachable { .. } => io::ErrorKind::NotConnected,
            Self::Broken { .. } => io::ErrorKind::TimedOut,
            // A bucket that is not there is never an object that is not there: nothing may be concluded from it.
            _ => io::ErrorKind::Other,
        }
    }
}

impl From<BucketFault> for io::Error {
    fn from(fault: BucketFault) -> Self {
        Self::new(fault.kind(), fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_that_is_not_there_is_not_an_object_that_is_not_there() {
        let body = b"<?xml version=\"1.0\"?><Error><Code>NoSuchBucket</Code><Message>gone\n</Message></Error>";
        let said = Answer::read(404, body);
        assert_eq!((said.code.as_str(), said.message.as_str()), ("NoSuchBucket", "gone"));
        let fault = BucketFault::of_answer(said);
        assert!(matches!(fault, BucketFault::NoBucket { .. }));
        assert_eq!(io::Error::from(fault).kind(), io::ErrorKind::Other);
        let fault = BucketFault::of_answer(Answer::read(404, b"<Error><Code>NoSuchKey</Code></Error>"));
        assert_eq!(io::Error::from(fault).kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_passes_is_told_from_what_lasts() {
        for status in [408, 409, 429, 500, 502, 503, 504] {
            let fault = BucketFault::of_answer(Answer::read(status, b""));
            assert!(fault.may_pass() && !fault.is_lasting(), "{status}");
        }
        for (status, code) in [(403, "AccessDenied"), (403, "RequestTimeTooSkewed"), (404, "NoSuchBucket"), (412, "")] {
            let body = format!("<Error><Code>{code}</Code></Error>");
            let fault = BucketFault::of_answer(Answer::read(status, body.as_bytes()));
            assert!(!fault.may_pass() && fault.is_lasting(), "{status} {code}");
        }
        // Whatever a body holds, it is cut short and can not write into a terminal.
        let long = format!("<Error><Message>{}\u{1b}[2J</Message></Error>", "x".repeat(10_000));
        let said = Answer::read(400, long.as_bytes());
        assert!(said.message.len() == 300 && !said.to_string().contains('\u{1b}'));
    }
}
