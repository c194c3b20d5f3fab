//! `PUT /pool/xmldbdump`: the pool's database is replaced by a dump, or a dump is only looked at.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use super::connection::{Link, send};
use super::request::Request;
use super::response;
use super::transfer::TransferTask;
use crate::FaultEffect;
use crate::core::Core;
use crate::model::{Database, Dump};
use crate::rpc::{Failure, Outcome};

/// Largest dump that is taken, in bytes.
const DUMP_LIMIT: u64 = 256 << 20;

pub(super) async fn handle<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Arc<Core>,
    host: usize,
    request: &Request,
    link: &mut Link<S>,
) {
    const CALL: &str = "http/pool/xmldbdump";
    core.counters.call(CALL);
    let fault = core.faults.strike(CALL);
    match &fault {
        Some(FaultEffect::Drop) => return,
        Some(FaultEffect::Hang) => return core.end.cancelled().await,
        Some(FaultEffect::Delay(time)) => tokio::time::sleep(*time).await,
        _ => {}
    }
    let _access = match super::auth::check(core, host, request, "put_pool_xml_db_sync") {
        Ok(access) => access,
        Err(page) => {
            send(link, &page).await;
            return;
        }
    };
    let task = TransferTask::new(core, host, request, "Reading database as XML");
    let Some(length) = request.content_length else {
        send(link, &response::bad_request()).await;
        task.succeed(None);
        return;
    };
    // As with every transfer success is said before the work.
    send(link, &response::transfer("HTTP/1.1 200 OK", &[])).await;
    let ordered = match fault {
        Some(FaultEffect::Error { code, params }) => Err(Failure { code, params }),
        _ => Ok(()),
    };
    let outcome = match ordered {
        Ok(()) => receive(core, host, link, length, request.param("dry_run") == Some("true")).await,
        Err(failure) => Err(failure),
    };
    match outcome {
        Ok(()) => task.succeed(None),
        Err(failure) => {
            task.fail(&failure);
            send(link, &response::internal_error(&response::escape(&failure.text()))).await;
        }
    }
}

async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    core: &Arc<Core>,
    host: usize,
    link: &mut Link<S>,
    length: u64,
    dry_run: bool,
) -> Outcome<()> {
    let length = usize::try_from(length).ok().filter(|length| *length as u64 <= DUMP_LIMIT);
    let length = length.ok_or_else(|| Failure::internal("Out_of_memory"))?;
    let body = link.input.exactly(length).await.map_err(|_| Failure::internal("End_of_file"))?;
    let node = core.host_at(host)?;
    let reference = node.reference.clone();
    let prepare = move |now: &Database| Dump::read(&String::from_utf8_lossy(&body))?.prepare(now, &reference);
    let database = prepare(&core.db())?;
    if dry_run {
        return Ok(());
    }
    let waiting = core.restores.get().ok_or_else(|| Failure::internal("no restore"))?;
    waiting.send((host, database)).await.map_err(|_| Failure::internal("the pool ends"))
}
