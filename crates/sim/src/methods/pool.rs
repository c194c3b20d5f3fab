//! The pool object.

use super::Call;
use crate::rpc::Outcome;

pub(super) fn call(call: &Call, simple: &str) -> Option<Outcome> {
    if simple != "set_default_SR" {
        return None;
    }
    let mut db = call.core.db();
    let outcome = db.check("pool", call.text(0)).and_then(|()| db.check("SR", call.text(1)));
    if outcome.is_ok() {
        db.set("pool", call.text(0), "default_SR", call.value(1));
    }
    Some(outcome.map(|()| crate::model::Value::void()))
}
