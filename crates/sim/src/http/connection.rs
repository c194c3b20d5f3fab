//! One connection: requests one after another until one of the sides has enough.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

use super::request::{Input, NoRequest, Request};
use super::{db_restore, export, import, reports, response, vm_export, vm_import};
use crate::core::Core;
use crate::methods::{Reply, dispatch};
use crate::rpc::{json_answer, read_json_call, read_xml_call, xml_answer, xml_bare};

/// Largest body of a call, in bytes.
const CALL_LIMIT: u64 = 64 << 20;

/// Both directions of a connection.
pub(super) struct Link<S> {
    pub(super) input: Input<ReadHalf<S>>,
    pub(super) output: WriteHalf<S>,
}

/// What becomes of the connection.
enum Next {
    Keep,
    Close,
}

pub(super) async fn serve<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(core: Arc<Core>, host: usize, stream: S) {
    let (reader, writer) = tokio::io::split(stream);
    let mut link = Link { input: Input::new(reader), output: writer };
    loop {
        let request = match link.input.request().await {
            Ok(request) => request,
            Err(NoRequest::End) => break,
            Err(NoRequest::TooLarge) => {
                send(&mut link, &response::too_large()).await;
                break;
            }
            Err(NoRequest::Malformed) => {
                send(&mut link, &response::internal_error("The HTTP headers could not be parsed.")).await;
                break;
            }
        };
        if matches!(answer(&core, host, &request, &mut link).await, Next::Close) {
            break;
        }
    }
    // The peer may be gone already.
    let _ = link.output.shutdown().await;
}

/// Sends bytes; `false` if the client is gone.
pub(super) async fn send<S: AsyncWrite + Unpin>(link: &mut Link<S>, bytes: &[u8]) -> bool {
    link.output.write_all(bytes).await.is_ok() && link.output.flush().await.is_ok()
}

async fn answer<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    core: &Arc<Core>,
    host: usize,
    request: &Request,
    link: &mut Link<S>,
) -> Next {
    if matches!(request.method.as_str(), "GET" | "PUT") {
        // A member can not check a session without its coordinator.
        core.await_coordinator().await;
    }
    match request.method.as_str() {
        "POST" => return call(core, host, request, link).await,
        "OPTIONS" => {
            send(link, &response::options(!request.close)).await;
            return if request.close { Next::Close } else { Next::Keep };
        }
        "GET" if request.path.starts_with("/export_raw_vdi") => export::handle(core, host, request, link).await,
        "PUT" if request.path.starts_with("/import_raw_vdi") => import::handle(core, host, request, link).await,
        "GET" if request.path == "/export" => vm_export::handle(core, host, request, link, false).await,
        "GET" if request.path == "/export_metadata" => vm_export::handle(core, host, request, link, true).await,
        "PUT" if request.path == "/import" => vm_import::handle(core, host, request, link, false).await,
        "PUT" if request.path == "/import_metadata" => vm_import::handle(core, host, request, link, true).await,
        "PUT" if request.path == "/pool/xmldbdump" => db_restore::handle(core, host, request, link).await,
        "GET" | "PUT" => match reports::Report::of(&request.path).filter(|_| request.method == "GET") {
            Some(report) => reports::handle(core, host, request, link, report).await,
            None => {
                send(link, &response::forbidden()).await;
            }
        },
        other => {
            send(link, &response::not_implemented(other)).await;
        }
    }
    Next::Close
}

async fn call<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Arc<Core>,
    host: usize,
    request: &Request,
    link: &mut Link<S>,
) -> Next {
    let Some(length) = request.content_length else {
        let text = response::escape("Failure(\"We require a content-length: HTTP header\")");
        send(link, &response::internal_error(&text)).await;
        return Next::Close;
    };
    let Some(length) = usize::try_from(length).ok().filter(|_| length <= CALL_LIMIT) else {
        send(link, &response::internal_error("Out_of_memory")).await;
        return Next::Close;
    };
    let Ok(body) = link.input.exactly(length).await else { return Next::Close };
    let body = String::from_utf8_lossy(&body).into_owned();
    let json = request.path.starts_with("/jsonrpc");
    let (method, params, json_call) = if json {
        match read_json_call(&body) {
            Ok(mut call) => (call.method.clone(), std::mem::take(&mut call.params), Some(call)),
            Err(error) => return malformed(link, &error).await,
        }
    } else {
        match read_xml_call(&body) {
            Ok((method, params)) => (method, params, None),
            Err(error) => return malformed(link, &error).await,
        }
    };
    let bare = method == "system.listMethods";
    // On its own: what was begun goes on when the client is gone.
    let own = Arc::clone(core);
    let work = tokio::spawn(async move { dispatch(&own, host, &method, params).await });
    let outcome = match work.await {
        Ok(Reply::Answer(outcome)) => outcome,
        Ok(Reply::Silence) => {
            core.end.cancelled().await;
            return Next::Close;
        }
        Ok(Reply::Close) | Err(_) => return Next::Close,
    };
    let (kind, text) = match &json_call {
        Some(call) => ("application/json", json_answer(call, &outcome)),
        None => ("text/xml", if bare { xml_bare(&outcome) } else { xml_answer(&outcome) }),
    };
    let sent = send(link, &response::rpc(&request.version, !request.close, kind, &text)).await;
    if sent && !request.close { Next::Keep } else { Next::Close }
}

async fn malformed<S: AsyncRead + AsyncWrite + Unpin>(link: &mut Link<S>, error: &str) -> Next {
    send(link, &response::internal_error(error)).await;
    Next::Close
}
