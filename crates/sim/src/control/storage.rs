//! The part of the control interface that is about storage.

use http::Method;

use crate::storage::CbtFault;
use crate::{SimError, SimPool};

/// Does an order about an SR or a disk; `None` if the path is no such order. `number` reads a number of the query.
pub(super) async fn order<E: From<SimError>>(
    pool: &SimPool,
    method: &Method,
    parts: &[&str],
    number: impl Fn(&str) -> Result<u64, E>,
) -> Option<Result<serde_json::Value, E>> {
    if method != Method::POST {
        return None;
    }
    let done = match parts {
        ["srs", sr, "garbage-collector", "run"] => pool.coalesce_all(sr),
        ["srs", sr, "garbage-collector", "stop"] => pool.stop_coalesce(sr),
        ["srs", sr, "garbage-collector", "start"] => pool.start_coalesce(sr),
        ["srs", sr, "garbage-collector", "step"] => {
            let shown = |start: crate::storage::CoalesceStart| {
                let work = start.work.map(|work| {
                    serde_json::json!({
                        "vdi": work.vdi, "onto": work.onto, "leaf": work.leaf, "bytes": work.bytes,
                        "extra_bytes": work.extra_bytes,
                    })
                });
                serde_json::json!({ "work": work, "no_space": start.no_space })
            };
            return Some(pool.step_coalesce(sr).await.map(shown).map_err(E::from));
        }
        ["srs", sr, "foreign-use"] => match number("bytes") {
            Ok(bytes) => pool.set_foreign_use(sr, bytes),
            Err(problem) => return Some(Err(problem)),
        },
        ["vdis", vdi, "cbt-faults", fault] => {
            let fault = match *fault {
                "resize" => CbtFault::Resize,
                "snapshot" => CbtFault::Snapshot,
                "snapshot-on-host" => CbtFault::SnapshotOnHost,
                "inconsistent" => CbtFault::Inconsistent,
                _ => return None,
            };
            pool.fail_cbt(vdi, fault)
        }
        _ => return None,
    };
    Some(done.map(|()| serde_json::json!({})).map_err(E::from))
}
