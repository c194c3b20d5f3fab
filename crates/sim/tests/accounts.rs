//! Accounts with roles, and sessions that end by themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may fail loudly"
)]

mod wire;

use std::time::Duration;

use serde_json::{Value, json};
use wire::{Client, exchange, raw_call};
use xenvault_sim::{AccountSpec, Role, SimOptions, SimPool};

/// A pool with one account for each role, named as the role.
async fn pool(change: impl FnOnce(&mut SimOptions)) -> SimPool {
    let account = |role: &Role| AccountSpec::new(role.name(), "their password", *role);
    let mut options =
        SimOptions { plain_http: true, accounts: Role::ALL.iter().map(account).collect(), ..SimOptions::default() };
    change(&mut options);
    SimPool::start(options).await.expect("starts")
}

async fn login(pool: &SimPool, role: Role) -> Client {
    let params = json!([role.name(), "their password", "1.0", "test"]);
    let session = raw_call(&pool.url(), "session.login_with_password", params).await.expect("logs in");
    Client { url: pool.url(), session: session.as_str().unwrap().to_owned() }
}

async fn vm(client: &Client, pool: &SimPool) -> String {
    client.reference("VM.get_by_uuid", &[json!(pool.vms()[0].uuid)]).await
}

/// The refusal of a permission, with the roles that have it.
fn denied(permission: &str, roles: &str) -> wire::Failed {
    let text = format!("No permission in user session. (Roles with this permission: {roles})");
    ("RBAC_PERMISSION_DENIED".to_owned(), vec![permission.to_owned(), text])
}

#[tokio::test]
async fn a_session_of_an_account_shows_what_it_may() {
    let pool = pool(|_| {}).await;
    let params = json!(["read-only", "wrong", "1.0", "test"]);
    let failed = raw_call(&pool.url(), "session.login_with_password", params).await.unwrap_err();
    assert_eq!(failed.0, "SESSION_AUTHENTICATION_FAILED");
    let client = login(&pool, Role::VmAdmin).await;
    let record = client.ok("session.get_record", &[json!(client.session)]).await;
    assert_eq!((&record["is_local_superuser"], &record["auth_user_name"]), (&json!(false), &json!("vm-admin")));
    let permissions = client.ok("session.get_rbac_permissions", &[json!(client.session)]).await;
    assert_eq!(permissions, record["rbac_permissions"]);
    let has = |name: &str| permissions.as_array().unwrap().iter().any(|known| known == name);
    for name in ["vdi.create", "vm.destroy", "vm.add_to_other_config", "http/get_export_raw_vdi", "vm.get_record"] {
        assert!(has(name), "{name}");
    }
    for name in ["vm.snapshot", "vm.add_to_other_config/key:pci", "http/get_pool_xml_db_sync", "sr.set_name_label"] {
        assert!(!has(name), "{name}");
    }
    let subject = client.ok("subject.get_record", &[record["subject"].clone()]).await;
    assert_eq!(subject["subject_identifier"], record["auth_user_sid"]);
    let role = client.ok("role.get_name_label", &[subject["roles"][0].clone()]).await;
    assert_eq!(role, "vm-admin");
    // The local root needs none.
    let root = Client::login(&pool).await;
    assert_eq!(root.ok("session.get_rbac_permissions", &[json!(root.session)]).await, json!([]));
    let sids = root.ok("session.get_all_subject_identifiers", &[]).await;
    assert_eq!(sids, json!([record["auth_user_sid"]]));
    root.ok("session.logout_subject_identifier", &[sids[0].clone()]).await;
    assert_eq!(client.failure("VM.get_all", &[]).await.0, "SESSION_INVALID");
}

#[tokio::test]
async fn each_call_needs_its_role_and_says_so() {
    let pool = pool(|_| {}).await;
    let (reader, operator) = (login(&pool, Role::ReadOnly).await, login(&pool, Role::VmOperator).await);
    let (admin, power) = (login(&pool, Role::VmAdmin).await, login(&pool, Role::VmPowerAdmin).await);
    let vm = vm(&reader, &pool).await;
    let disk = reader.ok("VDI.get_by_uuid", &[json!(pool.vms()[0].disks[0].vdi)]).await;
    let all = "pool-admin, pool-operator, vm-power-admin";
    let start = [json!(vm), json!(false), json!(false)];
    assert_eq!(reader.failure("VM.start", &start).await, denied("vm.start", &format!("{all}, vm-admin, vm-operator")));
    operator.ok("VM.start", &start).await;
    operator.ok("VM.hard_shutdown", &[json!(vm)]).await;
    let cbt = std::slice::from_ref(&disk);
    assert_eq!(operator.failure("VDI.enable_cbt", cbt).await, denied("vdi.enable_cbt", &format!("{all}, vm-admin")));
    admin.ok("VDI.enable_cbt", cbt).await;
    let snapshot = [json!(vm), json!("s")];
    assert_eq!(admin.failure("VM.snapshot", &snapshot).await, denied("vm.snapshot", all));
    power.ok("VM.snapshot", &snapshot).await;
    let sr = power.ok("SR.get_all", &[]).await[0].clone();
    let failed = power.failure("SR.set_name_label", &[sr.clone(), json!("n")]).await;
    assert_eq!(failed, denied("sr.set_name_label", "pool-admin, pool-operator"));
    login(&pool, Role::PoolOperator).await.ok("SR.set_name_label", &[sr, json!("n")]).await;
}

#[tokio::test]
async fn keys_of_maps_have_roles_of_their_own() {
    let pool = pool(|_| {}).await;
    let operator = login(&pool, Role::VmOperator).await;
    let admin = login(&pool, Role::VmAdmin).await;
    let vm = vm(&operator, &pool).await;
    let add = |key: &str| [json!(vm), json!(key), json!("1")];
    operator.ok("VM.add_to_other_config", &add("folder")).await;
    operator.ok("VM.add_to_other_config", &add("XenCenter.CustomFields.backup")).await;
    assert_eq!(operator.failure("VM.add_to_other_config", &add("mine")).await.1[0], "vm.add_to_other_config");
    admin.ok("VM.add_to_other_config", &add("mine")).await;
    let failed = admin.failure("VM.add_to_other_config", &add("pci")).await;
    assert_eq!(failed, denied("vm.add_to_other_config/key:pci", "pool-admin"));
}

#[tokio::test]
async fn a_background_call_that_is_refused_fails_its_task() {
    let pool = pool(|_| {}).await;
    let admin = login(&pool, Role::VmAdmin).await;
    let vm = vm(&admin, &pool).await;
    let task = admin.reference("Async.VM.snapshot", &[json!(vm), json!("s")]).await;
    let record = admin.wait(&task).await;
    assert_eq!((&record["status"], &record["error_info"][1]), (&json!("failure"), &json!("vm.snapshot")));
    assert_eq!(record["error_info"][0], "RBAC_PERMISSION_DENIED");
    assert_eq!(admin.ok("VM.get_snapshots", &[json!(vm)]).await, json!([]));
}

#[tokio::test]
async fn transfers_need_a_role_too() {
    let pool = pool(|_| {}).await;
    let (operator, admin) = (login(&pool, Role::VmOperator).await, login(&pool, Role::VmAdmin).await);
    let disk = &pool.vms()[0].disks[0].vdi;
    let task = operator.reference("task.create", &[json!("export"), json!("")]).await;
    let get = |session: &str, rest: &str| {
        format!("GET /export_raw_vdi?vdi={disk}&format=vhd&session_id={session}{rest} HTTP/1.1\r\nHost: x\r\n\r\n")
            .into_bytes()
    };
    let answer = exchange(&pool.url(), &get(&operator.session, &format!("&task_id={task}"))).await;
    assert_eq!(answer.start, "HTTP/1.1 403 Forbidden");
    let record = operator.wait(&task).await;
    let told: Vec<&str> = record["error_info"].as_array().unwrap().iter().map(|part| part.as_str().unwrap()).collect();
    assert_eq!(told[..2], ["RBAC_PERMISSION_DENIED", "http/get_export_raw_vdi"]);
    assert_eq!(exchange(&pool.url(), &get(&admin.session, "")).await.start, "HTTP/1.1 200 OK");
    let dump =
        |session: &str| format!("GET /pool/xmldbdump?session_id={session} HTTP/1.1\r\nHost: x\r\n\r\n").into_bytes();
    assert_eq!(exchange(&pool.url(), &dump(&admin.session)).await.start, "HTTP/1.1 403 Forbidden");
    let all = login(&pool, Role::PoolAdmin).await;
    assert_eq!(exchange(&pool.url(), &dump(&all.session)).await.start, "HTTP/1.1 200 OK");
}

#[tokio::test]
async fn a_session_that_is_not_used_ends() {
    let pool = pool(|options| options.session_timeout = Duration::ZERO).await;
    let client = Client::login(&pool).await;
    let failed = client.failure("VM.get_all", &[]).await;
    assert_eq!(failed, ("SESSION_INVALID".to_owned(), vec![client.session.clone()]));
    assert!(!pool.records("session").values().any(|session| session["originator"] == "test"));
    let pool = self::pool(|_| {}).await;
    let client = Client::login(&pool).await;
    client.ok("VM.get_all", &[]).await;
}

#[tokio::test]
async fn sessions_end_when_a_test_orders_it_and_a_wait_for_events_with_them() {
    let pool = pool(|_| {}).await;
    let client = Client::login(&pool).await;
    let token = client.ok("event.from", &[json!(["vm"]), json!(""), json!(1.0)]).await["token"].clone();
    let (url, session) = (pool.url(), client.session.clone());
    let waiting = tokio::spawn(async move {
        let params = json!([session, ["vm"], token, 600.0]);
        raw_call(&url, "event.from", params).await
    });
    while pool.counters().calls["event.from"] < 2 {
        tokio::task::yield_now().await;
    }
    let order = b"POST /sessions/expire HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(exchange(&pool.control_url(), order).await.start, "HTTP/1.1 200 OK");
    let ended: Result<Value, wire::Failed> =
        tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("ends").unwrap();
    assert_eq!(ended.unwrap_err().0, "SESSION_INVALID");
    assert_eq!(client.failure("VM.get_all", &[]).await.0, "SESSION_INVALID");
}

#[tokio::test]
async fn tasks_belong_to_an_account_as_long_as_their_session_lives() {
    let pool = pool(|_| {}).await;
    let (power, admin) = (login(&pool, Role::VmPowerAdmin).await, login(&pool, Role::VmAdmin).await);
    let task = power.reference("task.create", &[json!("mine"), json!("")]).await;
    let failed = admin.failure("task.cancel", &[json!(task)]).await;
    assert_eq!(failed, denied("task.destroy/any", "pool-admin, pool-operator"));
    // Another session of the same account may.
    let second = login(&pool, Role::VmPowerAdmin).await;
    second.ok("task.cancel", &[json!(task)]).await;
    power.ok("session.logout", &[]).await;
    let failed = second.failure("task.destroy", &[json!(task)]).await;
    assert_eq!(failed, denied("task.destroy/any", "pool-admin, pool-operator"));
    login(&pool, Role::PoolOperator).await.ok("task.destroy", &[json!(task)]).await;
}
