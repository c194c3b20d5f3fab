//! The control interface over HTTP: the same levers as [`crate::SimPool`]'s methods, for tests in any language.
//!
//! `GET /`, `/counters`, `/objects/CLASS`, `/new-objects`, `/vms/VM/disks/DEVICE?offset=&length=`,
//! `/vdis/UUID?offset=&length=`; `PUT /vms/VM/disks/DEVICE?offset=`; `POST /vms/VM/start?host=`, `/vms/VM/shutdown`,
//! `/vms/VM/migrate?host=`, `/vms/VM/ha-restart?host=`, `/hosts/INDEX/crash`, `/hosts/INDEX/stop`,
//! `/hosts/INDEX/start`, `/hosts/INDEX/coordinator`, `/hosts/INDEX/restart-toolstack?milliseconds=` and
//! `/hosts/INDEX/fail-over?milliseconds=` (both answer when it is up again), `/nbd/off|tls|insecure`, `/sessions/expire`, `/storage-migrations/hold|release`, `/faults` (JSON),
//! `/srs/SR/garbage-collector/run|step|stop|start`, `/srs/SR/foreign-use?bytes=`,
//! `/vdis/UUID/cbt-faults/resize|snapshot|snapshot-on-host|inconsistent`;
//! `DELETE /faults`.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use super::{Fault, FaultEffect};
use crate::core::Core;
use crate::{NbdAccess, SimError, SimPool};

/// Largest body, in bytes.
const BODY_LIMIT: usize = 64 << 20;

/// Serves until the pool ends. Holds the pool weakly: it must not keep it alive.
pub(crate) fn serve(pool: &SimPool, core: &Arc<Core>, listener: std::net::TcpListener) -> Result<(), SimError> {
    let io = SimError::io;
    listener.set_nonblocking(true).map_err(io("serve its control interface"))?;
    let listener = TcpListener::from_std(listener).map_err(io("serve its control interface"))?;
    let weak = pool.downgrade();
    let end = core.end.clone();
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                () = end.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else { continue };
            let (weak, end) = (weak.clone(), end.clone());
            tokio::spawn(async move {
                let service = service_fn(move |request| answer(weak.clone(), request));
                let connection =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                // Whatever ends a connection is the client's affair.
                tokio::select! {
                    () = end.cancelled() => {}
                    _ = connection => {}
                }
            });
        }
    });
    Ok(())
}

type Answer = Response<Full<Bytes>>;

async fn answer(weak: WeakPool, request: Request<Incoming>) -> Result<Answer, std::convert::Infallible> {
    let Some(pool) = weak.upgrade() else { return Ok(text(StatusCode::GONE, "the pool has ended")) };
    Ok(match route(&pool, request).await {
        Ok(answer) => answer,
        Err(Problem::Bad(what)) => text(StatusCode::BAD_REQUEST, &what),
        Err(Problem::Missing) => text(StatusCode::NOT_FOUND, "no such path"),
        Err(Problem::Pool(error)) => text(StatusCode::CONFLICT, &error.to_string()),
    })
}

enum Problem {
    Bad(String),
    Missing,
    Pool(SimError),
}

impl From<SimError> for Problem {
    fn from(error: SimError) -> Self {
        Self::Pool(error)
    }
}

fn text(status: StatusCode, message: &str) -> Answer {
    let body = serde_json::json!({ "error": message }).to_string();
    with(status, "application/json", body.into())
}

fn json(value: &serde_json::Value) -> Answer {
    with(StatusCode::OK, "application/json", value.to_string().into())
}

fn with(status: StatusCode, kind: &'static str, body: Bytes) -> Answer {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}

async fn route(pool: &SimPool, request: Request<Incoming>) -> Result<Answer, Problem> {
    let method = request.method().clone();
    let path = percent_encoding::percent_decode_str(request.uri().path()).decode_utf8_lossy().into_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let number = |name: &str| -> Result<u64, Problem> {
        let found = query.split('&').filter_map(|part| part.split_once('=')).find(|(known, _)| *known == name);
        let (_, value) = found.ok_or_else(|| Problem::Bad(format!("{name} is missing")))?;
        value.parse().map_err(|_| Problem::Bad(format!("{name} is not a number")))
    };
    let done = || json(&serde_json::json!({}));
    let encode = |value: Result<serde_json::Value, serde_json::Error>| {
        value.map(|value| json(&value)).map_err(|error| Problem::Bad(error.to_string()))
    };
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    if let Some(done) = super::storage::order(pool, &method, &parts, number).await {
        return done.map(|answer| json(&answer));
    }
    Ok(match (&method, parts.as_slice()) {
        (&Method::GET, []) => json(&pool.description()),
        (&Method::GET, ["counters"]) => return encode(serde_json::to_value(pool.counters())),
        (&Method::GET, ["objects", class]) => json(&serde_json::Value::Object(pool.records(class))),
        (&Method::GET, ["new-objects"]) => return encode(serde_json::to_value(pool.new_objects())),
        (&Method::GET, ["vms", vm, "disks", device]) => {
            let bytes = pool.guest_read(vm, device, number("offset")?, number("length")?)?;
            with(StatusCode::OK, "application/octet-stream", bytes.into())
        }
        (&Method::GET, ["vdis", vdi]) => {
            let bytes = pool.vdi_read(vdi, number("offset")?, number("length")?)?;
            with(StatusCode::OK, "application/octet-stream", bytes.into())
        }
        (&Method::PUT, ["vms", vm, "disks", device]) => {
            let offset = number("offset")?;
            let data = body(request).await?;
            pool.guest_write(vm, device, offset, &data)?;
            done()
        }
        (&Method::POST, ["vms", vm, action]) => {
            let host = || number("host").map(|host| usize::try_from(host).unwrap_or(usize::MAX));
            match *action {
                "start" => pool.start_vm(vm, host()?).await?,
                "shutdown" => pool.shutdown_vm(vm).await?,
                "migrate" => pool.migrate_vm(vm, host()?).await?,
                "ha-restart" => pool.ha_restart_vm(vm, host()?).await?,
                _ => return Err(Problem::Missing),
            }
            done()
        }
        (&Method::POST, ["hosts", index, action]) => {
            let index = index.parse().map_err(|_| Problem::Missing)?;
            match *action {
                "crash" => pool.crash_host(index).await?,
                "stop" => pool.stop_host(index).await?,
                "start" => pool.start_host(index).await?,
                "coordinator" => pool.move_coordinator(index).await?,
                "restart-toolstack" => {
                    pool.restart_toolstack(index, Duration::from_millis(number("milliseconds")?)).await?;
                }
                "fail-over" => pool.fail_over(index, Duration::from_millis(number("milliseconds")?)).await?,
                _ => return Err(Problem::Missing),
            }
            done()
        }
        (&Method::POST, ["sessions", "expire"]) => {
            pool.expire_sessions();
            done()
        }
        (&Method::POST, ["storage-migrations", action @ ("hold" | "release")]) => {
            pool.hold_storage_migrations(*action == "hold");
            done()
        }
        (&Method::POST, ["nbd", access]) => {
            pool.set_nbd(match *access {
                "off" => NbdAccess::Off,
                "tls" => NbdAccess::Tls,
                "insecure" => NbdAccess::Insecure,
                _ => return Err(Problem::Missing),
            });
            done()
        }
        (&Method::POST, ["faults"]) => {
            pool.fault(read_fault(&body(request).await?)?);
            done()
        }
        (&Method::DELETE, ["faults"]) => {
            pool.clear_faults();
            done()
        }
        _ => return Err(Problem::Missing),
    })
}

async fn body(request: Request<Incoming>) -> Result<Bytes, Problem> {
    let body = Limited::new(request.into_body(), BODY_LIMIT).collect().await;
    body.map(http_body_util::Collected::to_bytes).map_err(|error| Problem::Bad(error.to_string()))
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct FaultOrder {
    call: String,
    #[serde(default)]
    skip: u64,
    #[serde(default = "once")]
    count: u64,
    effect: String,
    #[serde(default)]
    code: String,
    #[serde(default)]
    params: Vec<String>,
    #[serde(default)]
    milliseconds: u64,
    #[serde(default)]
    bytes: u64,
}

fn once() -> u64 {
    1
}

fn read_fault(body: &[u8]) -> Result<Fault, Problem> {
    let order: FaultOrder = serde_json::from_slice(body).map_err(|error| Problem::Bad(error.to_string()))?;
    let effect = match order.effect.as_str() {
        "error" => FaultEffect::Error { code: order.code, params: order.params },
        "error-after" => FaultEffect::ErrorAfter { code: order.code, params: order.params },
        "delay" => FaultEffect::Delay(Duration::from_millis(order.milliseconds)),
        "drop" => FaultEffect::Drop,
        "drop-after" => FaultEffect::DropAfter,
        "truncate" => FaultEffect::Truncate(order.bytes),
        "hang" => FaultEffect::Hang,
        other => return Err(Problem::Bad(format!("no effect {other:?}"))),
    };
    Ok(Fault { call: order.call, skip: order.skip, count: order.count, effect })
}

/// A pool that may be gone.
#[derive(Clone)]
pub(crate) struct WeakPool(pub(crate) Weak<crate::pool::Inner>);

impl WeakPool {
    fn upgrade(&self) -> Option<SimPool> {
        self.0.upgrade().map(SimPool::from_inner)
    }
}
