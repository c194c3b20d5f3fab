//! From a method's name to its answer: counters, faults, the checks that xapi makes first, and background tasks.

use std::sync::Arc;

use futures::future::BoxFuture;

use super::{
    Call, event, generic, host, host_life, message, network, pool, rbac, session, sr, task, vbd, vdi, vdi_cbt,
    vdi_copy, vif, vm, vm_migrate, vm_power, vm_revert, vm_set, vm_suspend, vtpm, vusb,
};
use crate::FaultEffect;
use crate::core::Core;
use crate::model::{Class, Method, Value, new_ref, schema};
use crate::rpc::{Failure, Outcome};

/// What the client gets.
pub(crate) enum Reply {
    /// An answer.
    Answer(Outcome),
    /// The connection is closed without one.
    Close,
    /// Nothing, and the connection stays open.
    Silence,
}

/// Methods that servers from before changed block tracking do not know.
const CBT_METHODS: &[&str] = &[
    "VDI.enable_cbt",
    "VDI.disable_cbt",
    "VDI.data_destroy",
    "VDI.list_changed_blocks",
    "VDI.get_nbd_info",
    "VDI.get_cbt_enabled",
    "network.add_purpose",
    "network.remove_purpose",
    "network.get_purpose",
];

/// Methods that a member answers without its coordinator.
const OWN_METHODS: &[&str] =
    &["session.login_with_password", "session.slave_local_login_with_password", "system.listMethods"];

/// Does a call as it came from the wire.
pub(crate) async fn dispatch(core: &Arc<Core>, host: usize, method: &str, params: Vec<Value>) -> Reply {
    let (name, background) = match method.strip_prefix("Async.") {
        Some(name) => (name, true),
        None => (method, false),
    };
    core.counters.call(name);
    if background {
        core.counters.call(method);
    }
    let mut failure = None;
    let mut after = None;
    match core.faults.strike(name) {
        None | Some(FaultEffect::Truncate(_)) => {}
        Some(FaultEffect::Error { code, params }) => failure = Some(Failure { code, params }),
        Some(FaultEffect::Delay(time)) => tokio::time::sleep(time).await,
        Some(FaultEffect::Drop) => return Reply::Close,
        Some(FaultEffect::Hang) => return Reply::Silence,
        Some(effect @ (FaultEffect::ErrorAfter { .. } | FaultEffect::TextAfter(_) | FaultEffect::DropAfter)) => {
            after = Some(effect);
        }
    }
    let late = match &after {
        Some(FaultEffect::ErrorAfter { code, params }) => {
            Some(Err(Failure { code: code.clone(), params: params.clone() }))
        }
        Some(FaultEffect::TextAfter(text)) => Some(Ok(Value::from(text.as_str()))),
        _ => None,
    };
    if core.host_at(host).is_ok_and(crate::core::HostNode::is_booting) {
        return Reply::Answer(Err(Failure::bare("HOST_STILL_BOOTING")));
    }
    if host != core.coordinator() && !OWN_METHODS.contains(&name) {
        core.await_coordinator().await;
    }
    // Every call is the coordinator's work and ends with its toolstack.
    let Ok(life) = core.host_at(core.coordinator()).map(crate::core::HostNode::life) else { return Reply::Close };
    let outcome = tokio::select! {
        biased;
        () = life.cancelled() => return Reply::Close,
        outcome = checked(core, host, name, background, params, failure, late) => outcome,
    };
    match after {
        Some(FaultEffect::DropAfter) => Reply::Close,
        _ => Reply::Answer(outcome),
    }
}

async fn checked(
    core: &Arc<Core>,
    host: usize,
    name: &str,
    background: bool,
    params: Vec<Value>,
    fault: Option<Failure>,
    late: Option<Outcome>,
) -> Outcome {
    if name == "system.listMethods" {
        return Ok(list_methods(core));
    }
    let unknown = || Failure::new("MESSAGE_METHOD_UNKNOWN", [name]);
    let (class, method, simple) = find(name).ok_or_else(unknown)?;
    if core.options.older_server && CBT_METHODS.contains(&name) {
        return Err(unknown());
    }
    if background && simple.starts_with("get_") {
        return Err(unknown());
    }
    let first = usize::from(!method.without_session);
    count(name, method, params.len(), first)?;
    let mut params = params.into_iter();
    let session = if method.without_session {
        String::new()
    } else {
        let given = crate::model::Type::Text.read(params.next().unwrap_or(Value::Nil), &|_| None)?;
        let session = given.as_str().to_owned();
        session::check(core, &session)?;
        session
    };
    let given: Vec<Value> = params.collect();
    let read = |(value, (_, kind, _)): (Value, &(String, crate::model::Type, bool))| class.read(kind, value);
    let params = given.into_iter().zip(&method.params).map(read).collect::<Outcome<Vec<_>>>();
    let task = new_ref();
    let call = |params, task| Call {
        core: Arc::clone(core),
        host,
        session: session.clone(),
        method: name.to_owned(),
        params,
        task,
    };
    if !background {
        if let Some(failure) = fault {
            return Err(failure);
        }
        let params = params?;
        rbac::check_call(core, &session, name, &params)?;
        let value = run(call(params, task)).await?;
        return late.unwrap_or(Ok(value));
    }
    let params = params?;
    let allowed = rbac::check_call(core, &session, name, &params);
    if !session.is_empty() {
        // It may have ended meanwhile: that is the call's failure. A refusal is the task's.
        session::check(core, &session)?;
    }
    let task = task::new_task(core, host, &format!("Async.{name}"), "");
    task::own(core, &task, &session);
    let call = call(params, task.clone());
    task::in_background(core, &task, async move {
        allowed?;
        if let Some(failure) = fault {
            return Err(failure);
        }
        let value = run(call).await?;
        late.unwrap_or(Ok(value))
    });
    Ok(task.into())
}

/// Class, method and its simple name.
fn find(name: &str) -> Option<(&'static Class, &'static Method, &str)> {
    let (class, simple) = name.split_once('.')?;
    let class = schema().get(class)?;
    Some((class, class.methods.get(simple)?, simple))
}

fn count(name: &str, method: &Method, given: usize, first: usize) -> Outcome<()> {
    let required = method.params.iter().filter(|(_, _, required)| *required).count();
    let most = method.params.len();
    let received = given.saturating_sub(first);
    if given >= first && (required..=most).contains(&received) {
        return Ok(());
    }
    Err(Failure::new("MESSAGE_PARAMETER_COUNT_MISMATCH", [name.to_owned(), required.to_string(), received.to_string()]))
}

fn list_methods(core: &Core) -> Value {
    let mut names = Vec::new();
    for class in schema().values() {
        for method in class.methods.keys() {
            let name = format!("{}.{method}", class.name);
            let hidden = core.options.older_server && CBT_METHODS.contains(&name.as_str());
            if !hidden && !unsupported(&name) {
                names.push(name);
            }
        }
    }
    names.sort();
    Value::texts(names)
}

/// Whether a method of the data model is one that this simulator does not do.
fn unsupported(name: &str) -> bool {
    let Some((class, _, simple)) = find(name) else { return true };
    !generic::supports(class, simple) && !SPECIAL.contains(&name)
}

/// Methods that are more than a getter or setter.
const SPECIAL: &[&str] = &[
    "session.login_with_password",
    "session.logout",
    "session.local_logout",
    "session.slave_local_login_with_password",
    "session.get_all_subject_identifiers",
    "session.logout_subject_identifier",
    "event.from",
    "event.register",
    "event.unregister",
    "event.next",
    "event.get_current_id",
    "event.inject",
    "task.create",
    "task.destroy",
    "task.cancel",
    "task.set_status",
    "task.set_progress",
    "task.set_result",
    "task.set_error_info",
    "message.create",
    "message.destroy",
    "message.destroy_many",
    "message.get",
    "message.get_since",
    "pool.set_default_SR",
    "host.migrate_receive",
    "host.get_servertime",
    "host.get_server_localtime",
    "host.get_server_certificate",
    "host.get_system_status_capabilities",
    "network.add_purpose",
    "network.remove_purpose",
    "VM.create",
    "VM.destroy",
    "VM.clone",
    "VM.copy",
    "VM.snapshot",
    "VM.snapshot_with_quiesce",
    "VM.checkpoint",
    "VM.revert",
    "VM.provision",
    "VM.start",
    "VM.start_on",
    "VM.clean_shutdown",
    "VM.hard_shutdown",
    "VM.shutdown",
    "VM.clean_reboot",
    "VM.hard_reboot",
    "VM.pool_migrate",
    "VM.migrate_send",
    "VM.assert_can_migrate",
    "VM.power_state_reset",
    "VM.suspend",
    "VM.resume",
    "VM.resume_on",
    "VM.pause",
    "VM.unpause",
    "VM.set_is_a_template",
    "VM.set_memory_limits",
    "VM.set_memory_static_range",
    "VM.set_memory_dynamic_range",
    "VM.set_memory",
    "VM.set_memory_static_max",
    "VM.set_memory_static_min",
    "VM.set_memory_dynamic_max",
    "VM.set_memory_dynamic_min",
    "VM.set_VCPUs_max",
    "VM.set_VCPUs_at_startup",
    "VM.set_HVM_shadow_multiplier",
    "VM.set_HVM_boot_policy",
    "VM.set_domain_type",
    "VM.set_bios_strings",
    "VM.copy_bios_strings",
    "VM.set_start_delay",
    "VM.set_shutdown_delay",
    "VM.set_order",
    "VM.set_actions_after_crash",
    "VM.set_has_vendor_device",
    "VM.set_ha_restart_priority",
    "VM.set_ha_always_run",
    "VM.set_NVRAM",
    "VM.add_to_NVRAM",
    "VM.remove_from_NVRAM",
    "VM.set_appliance",
    "VM.set_suspend_VDI",
    "VM.update_allowed_operations",
    "VM.assert_operation_valid",
    "VM.get_allowed_VBD_devices",
    "VM.get_allowed_VIF_devices",
    "VM.get_SRs_required_for_recovery",
    "VM.get_possible_hosts",
    "VM.maximise_memory",
    "VM.compute_memory_overhead",
    "VDI.create",
    "VDI.destroy",
    "VDI.snapshot",
    "VDI.clone",
    "VDI.copy",
    "VDI.pool_migrate",
    "VDI.resize",
    "VDI.resize_online",
    "VDI.enable_cbt",
    "VDI.disable_cbt",
    "VDI.data_destroy",
    "VDI.list_changed_blocks",
    "VDI.get_nbd_info",
    "VDI.set_name_label",
    "VDI.set_name_description",
    "VDI.set_sharable",
    "VDI.set_read_only",
    "VDI.set_on_boot",
    "VDI.set_allow_caching",
    "VDI.forget",
    "VDI.update",
    "VBD.create",
    "VBD.destroy",
    "VBD.plug",
    "VBD.unplug",
    "VBD.unplug_force",
    "VBD.insert",
    "VBD.eject",
    "VBD.set_mode",
    "VBD.assert_attachable",
    "VTPM.create",
    "VTPM.destroy",
    "VIF.create",
    "VIF.destroy",
    "VIF.plug",
    "VIF.unplug",
    "VIF.unplug_force",
    "VIF.move",
    "VIF.configure_ipv4",
    "VIF.configure_ipv6",
    "VIF.set_locking_mode",
    "VIF.set_ipv4_allowed",
    "VIF.set_ipv6_allowed",
    "VIF.add_ipv4_allowed",
    "VIF.add_ipv6_allowed",
    "VIF.remove_ipv4_allowed",
    "VIF.remove_ipv6_allowed",
    "SR.scan",
    "SR.update",
    "SR.forget",
    "SR.set_name_label",
    "SR.set_name_description",
    "SR.set_shared",
    "SR.get_supported_types",
    "PBD.create",
    "PBD.destroy",
    "PBD.plug",
    "PBD.unplug",
    "VUSB.create",
    "VUSB.destroy",
    "VUSB.unplug",
];

/// Does a checked call.
pub(crate) fn run(call: Call) -> BoxFuture<'static, Outcome> {
    Box::pin(async move {
        let name = call.method.clone();
        let (class, simple) = name.split_once('.').unwrap_or_default();
        host_life::check_live(&call.core, class, simple, call.text(0))?;
        let special = match class {
            "session" => session::call(&call, simple).await,
            "event" => event::call(&call, simple).await,
            "task" => task::call(&call, simple),
            "message" => message::call(&call, simple),
            "pool" => pool::call(&call, simple),
            "host" => host::call(&call, simple),
            "network" => network::call(&call, simple),
            "SR" | "PBD" => sr::call(&call, class, simple).await,
            "VTPM" => vtpm::call(&call, simple),
            "VIF" => vif::call(&call, simple).await,
            "VUSB" => vusb::call(&call, simple),
            "VBD" => vbd::call(&call, simple).await,
            "VDI" => match simple {
                "enable_cbt" | "disable_cbt" | "data_destroy" | "list_changed_blocks" | "get_nbd_info" => {
                    vdi_cbt::call(&call, simple).await
                }
                "copy" => Some(vdi_copy::copy(&call).await),
                "pool_migrate" => Some(vm_migrate::pool_migrate(&call).await),
                _ => vdi::call(&call, simple).await,
            },
            "VM" => match vm_set::call(&call, simple) {
                Some(outcome) => Some(outcome),
                None => match vm_power::call(&call, simple).await {
                    Some(outcome) => Some(outcome),
                    None if matches!(simple, "suspend" | "resume" | "resume_on" | "checkpoint") => {
                        vm_suspend::call(&call, simple).await
                    }
                    None if matches!(simple, "migrate_send" | "assert_can_migrate") => {
                        vm_migrate::call(&call, simple).await
                    }
                    None if simple == "revert" => Some(vm_revert::revert(&call).await),
                    None => vm::call(&call, simple).await,
                },
            },
            _ => None,
        };
        if let Some(outcome) = special {
            return outcome;
        }
        generic::call(&call, class, simple).unwrap_or_else(|| Err(Failure::new("NOT_IMPLEMENTED", [name.as_str()])))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A value of a type that names nothing.
    fn nothing(kind: &crate::model::Type) -> serde_json::Value {
        use crate::model::Type;
        match kind {
            Type::Int => 0.into(),
            Type::Float => 0.0.into(),
            Type::Bool => false.into(),
            Type::Set(_) => serde_json::json!([]),
            Type::Map(..) => serde_json::json!({}),
            Type::Any => serde_json::json!({}),
            _ => "".into(),
        }
    }

    #[tokio::test]
    async fn every_method_that_is_listed_is_done() {
        let options = crate::SimOptions { plain_http: true, ..crate::SimOptions::default() };
        let pool = crate::SimPool::start(options).await.unwrap();
        let listed = pool.call("system.listMethods", &[]).await.unwrap();
        for name in listed.as_array().unwrap() {
            let name = name.as_str().unwrap();
            let (_, method, _) = find(name).unwrap();
            if method.without_session || name == "session.logout" || name == "session.local_logout" {
                continue;
            }
            let params: Vec<_> = method.params.iter().map(|(_, kind, _)| nothing(kind)).collect();
            if let Err(crate::SimError::Api { code, .. }) = pool.call(name, &params).await {
                assert!(code != "NOT_IMPLEMENTED" && code != "MESSAGE_METHOD_UNKNOWN", "{name}: {code}");
            }
        }
    }

    #[test]
    fn every_special_method_is_one_of_the_data_model() {
        for name in SPECIAL {
            assert!(find(name).is_some(), "{name}");
        }
    }
}
