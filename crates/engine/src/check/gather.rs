//! Reads the records that the check judges: whole classes at once, so that a big pool costs few calls.

use std::collections::{BTreeMap, BTreeSet};

use xenvault_xenapi::{
    Session, host, host_metrics, network, pbd, pif, pool, session as session_class, sm, sr, vbd, vdi, vm,
};

use super::CheckRequest;
use super::facts::{Facts, HostFacts, VmFacts};
use crate::backup::prerequisites::{live_disk, skipped_device};
use crate::backup::select;
use crate::pool::Doing as _;
use crate::{Engine, EngineError};

/// Reads everything.
pub(super) async fn gather(engine: &Engine, request: &CheckRequest) -> Result<Facts, EngineError> {
    let session = engine.session();
    let chosen = chosen(session, request).await?;
    let mut facts = Facts {
        instance: engine.instance().to_owned(),
        pool: crate::pool::the_pool(session).await?,
        session: session_class::get_record(session, &session.reference()).await.doing("read our session's record")?,
        configured: session.options().url.clone(),
        coordinator: session.coordinator(),
        networks: network::get_all_records(session).await.doing("list the networks")?,
        pifs: pif::get_all_records(session).await.doing("list the PIFs")?,
        srs: sr::get_all_records(session).await.doing("list the SRs")?,
        pbds: pbd::get_all_records(session).await.doing("list the PBDs")?,
        managers: sm::get_all_records(session).await.doing("list the storage managers")?,
        vdis: vdi::get_all_records(session).await.doing("list the disks")?,
        ..Facts::default()
    };
    let metrics = host_metrics::get_all_records(session).await.doing("list the hosts' state")?;
    for (reference, record) in host::get_all_records(session).await.doing("list the hosts")? {
        let live = metrics.get(&record.metrics).is_some_and(|metrics| metrics.live);
        facts.hosts.insert(reference, HostFacts { record, live, ..HostFacts::default() });
    }
    let vbds = vbd::get_all_records(session).await.doing("list the VMs' devices")?;
    for record in chosen {
        let vm = of_vm(&facts.pool, &facts, &vbds, record);
        facts.vms.push(vm);
    }
    facts.sweep = crate::sweep::plan(engine).await?;
    Ok(facts)
}

async fn chosen(session: &Session, request: &CheckRequest) -> Result<Vec<vm::Record>, EngineError> {
    let mut chosen = Vec::new();
    let mut seen = BTreeSet::new();
    for wanted in &request.vms {
        let (_, record) = select::find(session, wanted).await?;
        if seen.insert(record.uuid.clone()) {
            chosen.push(record);
        }
    }
    if request.vms.is_empty() {
        let all = vm::get_all_records(session).await.doing("list the VMs")?;
        chosen.extend(all.into_values().filter(|record| select::refusal(record).is_none()));
    }
    Ok(chosen)
}

fn of_vm(pool: &pool::Record, facts: &Facts, vbds: &BTreeMap<vbd::Ref, vbd::Record>, record: vm::Record) -> VmFacts {
    let mut devices: Vec<&vbd::Record> = record.vbds.iter().filter_map(|reference| vbds.get(reference)).collect();
    devices.sort_by_key(|device| (device.userdevice.parse::<u32>().unwrap_or(u32::MAX), device.userdevice.clone()));
    let mut found = VmFacts { record, ..VmFacts::default() };
    for device in devices {
        if let Some(skipped) = skipped_device(device) {
            found.skipped.push(skipped);
            continue;
        }
        // A record that is gone since is for the next check.
        let Some(disk) = facts.vdis.get(&device.vdi) else { continue };
        let Some(sr) = facts.srs.get(&disk.sr) else { continue };
        found.disks.push(live_disk(pool, &facts.managers, device, disk.clone(), sr.clone()));
    }
    found
}
