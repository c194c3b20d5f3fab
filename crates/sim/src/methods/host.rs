//! Hosts: clock and certificate.

use super::Call;
use crate::model::{Value, date_text};
use crate::rpc::Outcome;

pub(super) fn call(call: &Call, simple: &str) -> Option<Outcome> {
    if simple == "migrate_receive" {
        return Some(super::vm_migrate::receive(call));
    }
    let host = call.core.host_of(call.text(0));
    Some(match simple {
        "get_servertime" | "get_server_localtime" => host.map(|_| Value::Date(date_text(jiff::Timestamp::now()))),
        "get_server_certificate" => host.map(|host| host.certificate_pem.as_str().into()),
        "get_system_status_capabilities" => host.map(|_| "<system-status-capabilities/>".into()),
        _ => return None,
    })
}
