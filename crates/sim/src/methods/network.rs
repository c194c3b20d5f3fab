//! Networks: the purposes that switch NBD on.

use super::Call;
use crate::model::{Database, Value};
use crate::rpc::{Failure, Outcome};

pub(super) fn call(call: &Call, simple: &str) -> Option<Outcome> {
    if !matches!(simple, "add_purpose" | "remove_purpose") {
        return None;
    }
    let (network, purpose) = (call.text(0), call.text(1));
    let mut db = call.core.db();
    if let Err(failure) = db.check("network", network) {
        return Some(Err(failure));
    }
    let mut purposes = db.set_of("network", network, "purpose");
    if simple == "remove_purpose" {
        purposes.retain(|known| known != purpose);
    } else {
        if let Some(other) = conflicting(&db, purpose) {
            return Some(Err(Failure::new("NETWORK_INCOMPATIBLE_PURPOSES", [purpose, other])));
        }
        if !purposes.iter().any(|known| known == purpose) {
            purposes.insert(0, purpose.to_owned());
        }
    }
    db.set("network", network, "purpose", Value::texts(purposes));
    Some(Ok(Value::void()))
}

/// Both kinds of NBD at once are refused over the whole pool.
fn conflicting(db: &Database, purpose: &str) -> Option<&'static str> {
    let other = match purpose {
        "nbd" => "insecure_nbd",
        "insecure_nbd" => "nbd",
        _ => return None,
    };
    let has = |network: &String| db.set_of("network", network, "purpose").iter().any(|known| known == other);
    db.refs("network").iter().any(has).then_some(other)
}
