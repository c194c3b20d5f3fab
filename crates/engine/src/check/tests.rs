//! The judgement, from facts alone.

use std::collections::BTreeMap;

use xenvault_xenapi::{AnyRef, host, network, vm};

use super::facts::{Facts, HostFacts, NbdFacts, VmFacts};
use super::rights::{Need, RIGHTS, Right, Role};
use super::{CheckFinding, Severity, judge_pool, judge_vm};
use crate::options::ClearText;

/// A pool of one good host with NBD on its network.
fn good() -> Facts {
    let coordinator = host::Ref::new("OpaqueRef:host");
    let record = host::Record { uuid: "h-uuid".into(), enabled: true, ..Default::default() };
    let network = network::Record { uuid: "n-uuid".into(), purpose: vec![network::Purpose::Nbd], ..Default::default() };
    let mut facts = Facts { configured: "https://a".into(), coordinator: "https://a".into(), ..Facts::default() };
    facts.pool.master = coordinator.clone();
    facts.session.is_local_superuser = true;
    facts.hosts.insert(coordinator, HostFacts { record, live: true, ..HostFacts::default() });
    facts.networks.insert(network::Ref::new("OpaqueRef:network"), network);
    facts
}

fn of_pool(change: impl FnOnce(&mut Facts)) -> Vec<(Severity, &'static str)> {
    let mut facts = good();
    change(&mut facts);
    short(judge_pool::judge(&facts, ClearText::Refuse))
}

fn short(findings: Vec<CheckFinding>) -> Vec<(Severity, &'static str)> {
    for finding in &findings {
        assert!(!finding.remedy.is_empty() && !finding.consequence.is_empty(), "{finding:?}");
    }
    findings.into_iter().map(|finding| (finding.severity, finding.code)).collect()
}

fn the_host(facts: &mut Facts) -> &mut HostFacts {
    facts.hosts.values_mut().next().unwrap()
}

#[test]
fn each_fault_of_a_pool_is_one_finding() {
    use Severity::{Error, Note, Warning};
    let nbd = |address: &str, failure: Option<&str>| NbdFacts {
        address: address.parse().unwrap(),
        failure: failure.map(str::to_owned),
    };
    assert_eq!(of_pool(|_| {}), []);
    assert_eq!(of_pool(|facts| the_host(facts).live = false), [(Warning, "host-down")]);
    assert_eq!(of_pool(|facts| the_host(facts).record.enabled = false), [(Note, "host-disabled")]);
    assert_eq!(of_pool(|facts| the_host(facts).unreachable = Some("refused".into())), [(Error, "host-unreachable")]);
    assert_eq!(of_pool(|facts| the_host(facts).clock_ahead = Some(60)), []);
    assert_eq!(of_pool(|facts| the_host(facts).clock_ahead = Some(-61)), [(Warning, "clock")]);
    assert_eq!(of_pool(|facts| facts.coordinator = "https://b".into()), [(Note, "not-the-coordinator")]);
    let restricted = ("restrict_cbt".to_owned(), "true".to_owned());
    assert_eq!(of_pool(|facts| facts.pool.restrictions = BTreeMap::from([restricted])), [(Warning, "cbt-restricted")]);
    assert_eq!(of_pool(|facts| facts.networks.clear()), [(Error, "nbd-not-enabled")]);
    let lost = || nbd("192.0.2.1:10809", Some("no answer"));
    assert_eq!(of_pool(|facts| facts.nbd = vec![lost()]), [(Error, "nbd-unreachable")]);
    let one_is_good = vec![lost(), nbd("192.0.2.2:10809", None)];
    assert_eq!(of_pool(|facts| facts.nbd = one_is_good), [(Warning, "nbd-unreachable")]);
}

#[test]
fn x24_an_ipv6_address_that_nobody_serves_is_no_error() {
    let failure = Some("refused".to_owned());
    let fact = NbdFacts { address: "[2001:db8::1]:10809".parse().unwrap(), failure };
    assert_eq!(of_pool(|facts| facts.nbd = vec![fact]), [(Severity::Note, "nbd-unreachable")]);
}

#[test]
fn x23_both_purposes_are_an_error_and_the_remedy_removes_one() {
    let mut facts = good();
    let insecure =
        network::Record { uuid: "i-uuid".into(), purpose: vec![network::Purpose::InsecureNbd], ..Default::default() };
    facts.networks.insert(network::Ref::new("OpaqueRef:other"), insecure);
    let findings = judge_pool::judge(&facts, ClearText::Refuse);
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!((findings[0].code, findings[0].object.uuid.as_str()), ("nbd-mixed", "i-uuid"));
    assert!(findings[0].remedy.contains("param-remove"), "{findings:?}");
}

/// The pool as an account sees it that has these rights; `None` of them is a server without roles.
fn with_rights(facts: &mut Facts, may: impl Fn(&Right) -> bool) {
    facts.session.is_local_superuser = false;
    facts.session.auth_user_name = "backup".into();
    facts.session.auth_user_sid = "S-1-5-21".into();
    facts.session.rbac_permissions = vec!["vm.get_record".into()];
    facts.session.rbac_permissions.extend(RIGHTS.iter().filter(|right| may(right)).map(Right::permission));
}

#[test]
fn an_account_is_told_which_calls_it_lacks_and_the_least_role_that_has_them() {
    use Severity::{Error, Note, Warning};
    let with = |may: fn(&Right) -> bool| of_pool(|facts| with_rights(facts, may));
    let less = RIGHTS.iter().filter(|right| matches!(right.need, Need::Less(_))).count();
    let mut nothing = vec![(Error, "account-backup"), (Warning, "account-restore")];
    nothing.extend(vec![(Note, "account-less"); less]);
    assert_eq!(with(|_| false), nothing);
    assert_eq!(with(|_| true), []);
    // Roles as the pool gives them.
    assert_eq!(with(|right| right.role <= Role::PoolOperator), [(Note, "account-less")]);
    assert_eq!(with(|right| right.role <= Role::VmPowerAdmin), [(Note, "account-less"); 2]);
    let of_admin = with(|right| right.role <= Role::VmAdmin);
    assert_eq!(of_admin.iter().filter(|(severity, _)| *severity != Note).count(), 2, "{of_admin:?}");
    assert_eq!(of_pool(|facts| facts.session.is_local_superuser = false), [], "a server without roles");

    let mut facts = good();
    with_rights(&mut facts, |right| right.role <= Role::VmAdmin);
    let findings = judge_pool::judge(&facts, ClearText::Refuse);
    let backup = findings.iter().find(|finding| finding.code == "account-backup").unwrap();
    assert!(backup.reason.contains("may not call VM.snapshot, which a backup needs"), "{backup:?}");
    assert!(backup.reason.contains("the least role that may is vm-power-admin"), "{backup:?}");
    assert!(backup.remedy.contains("subject-identifier=S-1-5-21 --minimal) role-name=vm-power-admin`"), "{backup:?}");
}

#[test]
fn a_server_without_nbd_is_a_warning_and_needs_no_rights_for_what_it_does_not_have() {
    let old = |facts: &mut Facts| {
        facts.networks.clear();
        facts.without_nbd = Some("it does not have the method VDI.get_nbd_info".into());
    };
    assert_eq!(of_pool(old), [(Severity::Warning, "nbd-unsupported")]);
    let found = of_pool(|facts| {
        old(facts);
        with_rights(facts, |right| !right.newer);
    });
    assert_eq!(found, [(Severity::Warning, "nbd-unsupported")]);
}

#[test]
fn x32_what_forbids_a_snapshot_is_named_even_if_the_list_of_operations_is_stale() {
    let of_vm = |change: fn(&mut vm::Record)| {
        let mut record = vm::Record { uuid: "v-uuid".into(), name_label: "web".into(), ..Default::default() };
        record.allowed_operations = vec![vm::Operations::Snapshot];
        change(&mut record);
        let findings = judge_vm::judge(&good(), &VmFacts { record, ..VmFacts::default() });
        findings.into_iter().filter(|finding| finding.code == "snapshot-not-allowed").collect::<Vec<_>>()
    };
    assert_eq!(of_vm(|_| {}), []);
    let remedy = |findings: Vec<CheckFinding>| {
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!(findings[0].severity, Severity::Error);
        findings[0].remedy.clone()
    };
    let usb = remedy(of_vm(|record| record.vusbs = vec![AnyRef::new("OpaqueRef:usb")]));
    assert!(usb.contains("`xe vusb-list vm-uuid=v-uuid`"), "{usb}");
    let blocked = remedy(of_vm(|record| {
        record.blocked_operations = BTreeMap::from([(vm::Operations::Snapshot, "never".to_owned())]);
    }));
    assert!(blocked.contains("param-key=snapshot uuid=v-uuid"), "{blocked}");
    let migrating = remedy(of_vm(|record| {
        record.allowed_operations.clear();
        record.current_operations = BTreeMap::from([("OpaqueRef:task".to_owned(), vm::Operations::PoolMigrate)]);
    }));
    assert!(migrating.contains("wait"), "{migrating}");
    let suspended = remedy(of_vm(|record| {
        record.allowed_operations.clear();
        record.power_state = vm::PowerState::Suspended;
    }));
    assert!(!suspended.is_empty());
}
