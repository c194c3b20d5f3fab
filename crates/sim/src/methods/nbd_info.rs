//! `VDI.get_nbd_info`: where a disk can be read over NBD.

use super::{Call, sr, vdi_checks};
use crate::model::{Database, Value};
use crate::rpc::Outcome;

pub(super) fn get(call: &Call) -> Outcome {
    let core = &call.core;
    let db = core.db();
    let vdi = call.text(0);
    vdi_checks::check_has_data(&db, vdi)?;
    let export = format!("/{}?session_id={}", db.text("VDI", vdi, "uuid"), call.session);
    let mut infos = Vec::new();
    for host in sr::hosts(&db, &db.text("VDI", vdi, "SR")) {
        let node = core.host_of(&host)?;
        for address in addresses(&db, &host) {
            infos.push(Value::Map(vec![
                ("exportname".into(), export.as_str().into()),
                ("address".into(), address.into()),
                ("port".into(), Value::Int(i64::from(node.nbd_port()))),
                ("cert".into(), node.certificate_pem.as_str().into()),
                ("subject".into(), node.subject.as_str().into()),
            ]));
        }
    }
    Ok(Value::List(infos))
}

/// Addresses of a host on networks with a purpose for NBD.
fn addresses(db: &Database, host: &str) -> Vec<String> {
    let mut addresses = Vec::new();
    for pif in db.set_of("host", host, "PIFs") {
        let purposes = db.set_of("network", &db.text("PIF", &pif, "network"), "purpose");
        let for_nbd = purposes.iter().any(|purpose| purpose == "nbd" || purpose == "insecure_nbd");
        if !for_nbd || !db.flag("PIF", &pif, "currently_attached") {
            continue;
        }
        let of_pif = [db.text("PIF", &pif, "IP")].into_iter().chain(db.set_of("PIF", &pif, "IPv6"));
        addresses.extend(of_pif.filter(|address| !address.is_empty()));
    }
    addresses
}
