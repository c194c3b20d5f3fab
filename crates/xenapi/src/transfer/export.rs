//! Reading a disk, or only the head of it.

use super::{Handler, Reply, start, success};
use crate::error::{Phase, XenApiError};
use crate::http_client::{Pace, TooSlow};
use crate::session_handle::{Floor, Session};
use crate::tasks::TaskGuard;
use crate::{host, vdi};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;

const OPERATION: &str = "/export_raw_vdi";

/// The footer of a VHD: at its begin, and again at its end.
const FOOTER_BYTES: usize = 512;

/// The form that a disk is exported in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// Every byte; the length is the disk's.
    Raw {
        /// The disk's virtual size: the transfer must have exactly this length.
        virtual_size: u64,
    },
    /// A dynamic VHD stream; with a base, only what differs from it.
    Vhd {
        /// The older disk.
        base: Option<vdi::Ref>,
    },
}

/// A disk that is being exported.
///
/// Dropping it, or [`ExportBody::close`], ends the transfer early; its task then fails at the host, which is expected,
/// and is destroyed.
pub struct ExportBody {
    body: Option<Incoming>,
    guard: TaskGuard,
    host: String,
    floor: Floor,
    pace: Pace,
    received: u64,
    shape: Shape,
}

/// What is known in advance of the bytes.
enum Shape {
    Raw { virtual_size: u64 },
    Vhd { first: Vec<u8>, last: Vec<u8> },
}

impl std::fmt::Debug for ExportBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExportBody").field("host", &self.host).field("received", &self.received).finish_non_exhaustive()
    }
}

impl ExportBody {
    /// The next bytes, or `None` at the end. The end of the bytes is no success: ask [`ExportBody::finish`].
    ///
    /// # Errors
    /// [`XenApiError::Connection`], [`XenApiError::TooSlow`]. The real reason may be the task's: ask
    /// [`ExportBody::finish`].
    pub async fn next(&mut self) -> Result<Option<Bytes>, XenApiError> {
        loop {
            let Some(body) = self.body.as_mut() else { return Ok(None) };
            let error = match self.pace.wait(body.frame()).await {
                Ok(None) => {
                    self.body = None;
                    return Ok(None);
                }
                Ok(Some(Ok(frame))) => {
                    let Ok(data) = frame.into_data() else { continue };
                    if data.is_empty() {
                        continue;
                    }
                    self.pace.moved(data.len());
                    return Ok(self.take(data));
                }
                Ok(Some(Err(source))) => {
                    XenApiError::Connection { host: self.host.clone(), phase: Phase::Body, source: Box::new(source) }
                }
                Err(TooSlow) => XenApiError::too_slow(self.host.clone(), Phase::Body, &self.floor),
            };
            self.body = None;
            // Hosts that just close the TLS connection are common, so the end may be right all the same.
            if matches!(error, XenApiError::Connection { .. }) && self.is_complete() {
                return Ok(None);
            }
            return Err(error);
        }
    }

    /// Counts and bounds what came. What follows the disk's last byte is a second response that reports a failure.
    fn take(&mut self, mut data: Bytes) -> Option<Bytes> {
        let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let before = self.received;
        self.received = self.received.saturating_add(length);
        match &mut self.shape {
            Shape::Raw { virtual_size } => {
                let left = virtual_size.saturating_sub(before);
                if length > left {
                    self.body = None;
                    data.truncate(usize::try_from(left).unwrap_or(0));
                }
            }
            Shape::Vhd { first, last } => {
                let wanted = FOOTER_BYTES.saturating_sub(first.len()).min(data.len());
                first.extend(data.iter().take(wanted));
                last.extend(data.iter().skip(data.len().saturating_sub(FOOTER_BYTES)));
                let surplus = last.len().saturating_sub(FOOTER_BYTES);
                last.drain(..surplus);
            }
        }
        (!data.is_empty()).then_some(data)
    }

    fn is_complete(&self) -> bool {
        match &self.shape {
            Shape::Raw { virtual_size } => self.received == *virtual_size,
            Shape::Vhd { first, last } => {
                self.received > 2 * (FOOTER_BYTES as u64) && first.starts_with(b"conectix") && first == last
            }
        }
    }

    /// Bytes that the host sent so far.
    pub fn received_bytes(&self) -> u64 {
        self.received
    }

    /// Waits for the task and checks the length (of a VHD stream: that it ends with its footer); only then the bytes
    /// are good. To be called after [`ExportBody::next`] gave `None` or an error.
    ///
    /// # Errors
    /// [`XenApiError::Api`] with the task's failure, [`XenApiError::Length`], [`XenApiError::Response`] for a VHD
    /// stream without its end, [`XenApiError::TaskVanished`].
    pub async fn finish(mut self) -> Result<(), XenApiError> {
        self.body = None;
        let complete = self.is_complete();
        success(OPERATION, self.guard).await?;
        if complete {
            return Ok(());
        }
        match self.shape {
            Shape::Raw { virtual_size } => Err(XenApiError::Length {
                operation: OPERATION.to_owned(),
                expected: virtual_size,
                found: self.received,
            }),
            Shape::Vhd { .. } => Err(XenApiError::Response {
                operation: OPERATION.to_owned(),
                source: "the VHD stream does not end with a copy of its first footer".into(),
            }),
        }
    }

    /// Ends the transfer early: closes the connection, waits until the task has ended (so that the disk is free
    /// again) and destroys it. The task's failure is expected and not reported.
    ///
    /// # Errors
    /// Those of the calls that this takes; the task is cleaned up in the background then.
    pub async fn close(mut self) -> Result<(), XenApiError> {
        self.body = None;
        self.guard.expect_failure().await
    }
}

/// Starts `/export_raw_vdi` at `host`, which should have the disk's SR attached: a host that has not sends the request
/// on to another member, which is followed.
///
/// # Errors
/// [`XenApiError::Api`] (unknown disk), [`XenApiError::UnknownHost`] (sent to a stranger), [`XenApiError::Status`], and
/// those of connections.
pub async fn export_raw_vdi(
    session: &Session,
    host: &host::Ref,
    vdi: &vdi::Ref,
    format: ExportFormat,
) -> Result<ExportBody, XenApiError> {
    let mut query = vec![("vdi", vdi.as_str().to_owned())];
    let shape = match format {
        ExportFormat::Raw { virtual_size } => {
            query.push(("format", "raw".to_owned()));
            Shape::Raw { virtual_size }
        }
        ExportFormat::Vhd { base } => {
            query.push(("format", "vhd".to_owned()));
            query.extend(base.map(|base| ("base", base.as_str().to_owned())));
            Shape::Vhd { first: Vec::new(), last: Vec::new() }
        }
    };
    let handler = Handler { path: OPERATION, query };
    let timeouts = &session.options().timeouts;
    let wait = timeouts.work_call;
    let sent = start(session, host, &handler, |client, target| async move {
        let response = client.get(OPERATION, &target, wait).await?;
        let location = response.headers().get("location").and_then(|value| value.to_str().ok()).map(str::to_owned);
        Ok(match (response.status().as_u16(), location) {
            (200, _) => Reply::Accepted((response.into_body(), client.endpoint.display_host())),
            (302, Some(location)) => Reply::Elsewhere(location),
            (status, _) => Reply::Refused(status),
        })
    });
    let ((body, at), guard) = sent.await?;
    let floor = timeouts.floor.clone();
    let pace = Pace::new(&floor);
    Ok(ExportBody { body: Some(body), guard, host: at, floor, pace, received: 0, shape })
}
