//! What is judged of the pool as a whole: version, account, coordinator, hosts, networks, storage, left-overs. Pure.

use xenvault_xenapi::network;

use super::facts::{Facts, HostFacts};
use super::finding::{CheckFinding, CheckedObject, Severity};
use super::rights::{Need, RIGHTS, Right, least_role};
use crate::backup::FindingKind;
use crate::backup::endpoints::access;
use crate::backup::prerequisites::unplugged;
use crate::options::ClearText;

/// A clock that differs by more than this is a warning, in seconds.
const CLOCK_LIMIT_SECONDS: u64 = 60;

/// Product, version and edition of the coordinator.
pub(super) fn product(facts: &Facts) -> String {
    let Some(host) = facts.hosts.get(&facts.pool.master) else { return "an unknown product".to_owned() };
    let version = |key: &str| host.record.software_version.get(key).map(String::as_str);
    let brand = version("product_brand").unwrap_or("XenServer");
    let number = version("product_version_text").or(version("product_version")).unwrap_or("of unknown version");
    format!("{brand} {number}, edition {:?}", host.record.edition)
}

/// Everything about the pool.
pub(super) fn judge(facts: &Facts, consent: ClearText) -> Vec<CheckFinding> {
    let mut findings = Vec::new();
    version(facts, &mut findings);
    account(facts, &mut findings);
    address(facts, &mut findings);
    for host in facts.hosts.values() {
        self::host(host, &mut findings);
    }
    networks(facts, consent, &mut findings);
    storage(facts, &mut findings);
    orphans(facts, &mut findings);
    findings
}

fn pool_object(facts: &Facts) -> CheckedObject {
    CheckedObject::new("pool", &facts.pool.uuid, &facts.pool.name_label)
}

fn version(facts: &Facts, findings: &mut Vec<CheckFinding>) {
    if facts.pool.restrictions.get("restrict_cbt").is_some_and(|value| value == "true") {
        findings.push(CheckFinding::new(
            Severity::Warning,
            FindingKind::CbtRestricted.code(),
            pool_object(facts),
            format!("the licence of this pool ({}) does not include changed block tracking", product(facts)),
            "every backup reads whole disks",
            format!(
                "assign a licence that includes it to every host: `xe host-apply-edition host-uuid={} edition=EDITION \
                 license-server-address=ADDRESS`",
                facts.hosts.get(&facts.pool.master).map_or("HOST-UUID", |host| &host.record.uuid)
            ),
        ));
    }
    let versions: std::collections::BTreeSet<_> = facts
        .hosts
        .values()
        .filter_map(|host| host.record.software_version.get("product_version"))
        .map(String::as_str)
        .collect();
    if versions.len() > 1 {
        let list: Vec<&str> = versions.into_iter().collect();
        findings.push(CheckFinding::new(
            Severity::Warning,
            "versions-differ",
            pool_object(facts),
            format!("the hosts run different versions ({}): an upgrade is not finished", list.join(", ")),
            "a VM whose host is older may be read without changed block tracking",
            "finish the upgrade of all hosts; `xe host-list params=uuid,name-label,software-version` shows them",
        ));
    }
}

/// What the account may not do, by its session's list of rights, and the least role that may.
fn account(facts: &Facts, findings: &mut Vec<CheckFinding>) {
    let session = &facts.session;
    // The local superuser has no list; neither has a server without roles.
    if session.is_local_superuser || session.rbac_permissions.is_empty() {
        return;
    }
    let may = |right: &Right| {
        let permission = right.permission();
        session.rbac_permissions.iter().any(|known| known.eq_ignore_ascii_case(&permission))
    };
    // What the server does not have is no right of anybody.
    let has = |right: &&Right| facts.without_nbd.is_none() || !right.newer;
    let missing: Vec<&Right> = RIGHTS.iter().filter(has).filter(|right| !may(right)).collect();
    let object = CheckedObject::new("session", "", &session.auth_user_name);
    let mut found = |severity, code, missing: Vec<&Right>, what: &str, consequence: &str| {
        let Some(role) = least_role(missing.iter().copied()) else { return };
        let calls: Vec<&str> = missing.iter().map(|right| right.call).collect();
        let reason = format!(
            "account {:?} may not call {}, which {what}: the least role that may is {role}",
            session.auth_user_name,
            calls.join(", ")
        );
        let remedy = format!(
            "give the account a role that has them: `xe subject-role-add uuid=$(xe subject-list \
             subject-identifier={} --minimal) role-name={role}`",
            session.auth_user_sid
        );
        findings.push(CheckFinding::new(severity, code, object.clone(), reason, consequence, remedy));
    };
    let of = |wanted: fn(Need) -> bool| missing.iter().copied().filter(|right| wanted(right.need)).collect();
    found(
        Severity::Error,
        "account-backup",
        of(Need::for_backup),
        "a backup needs",
        "backups with this account fail, or read every disk whole each time",
    );
    found(
        Severity::Warning,
        "account-restore",
        of(Need::for_restore),
        "a restore needs",
        "restores with this account fail",
    );
    for right in &missing {
        if let Need::Less(consequence) = right.need {
            found(Severity::Note, "account-less", vec![right], "can be done without", consequence);
        }
    }
}

fn address(facts: &Facts, findings: &mut Vec<CheckFinding>) {
    let plain = |url: &str| {
        let authority = url.split_once("://").map_or(url, |(_, rest)| rest).trim_end_matches('/');
        authority.strip_suffix(":443").unwrap_or(authority).to_ascii_lowercase()
    };
    if plain(&facts.configured) == plain(&facts.coordinator) {
        return;
    }
    findings.push(CheckFinding::new(
        Severity::Note,
        "not-the-coordinator",
        pool_object(facts),
        format!("{} is not the coordinator of the pool, {} is", facts.configured, facts.coordinator),
        "every login takes a detour, which fails while that host is down",
        format!("give {} with --pool", facts.coordinator),
    ));
}

fn host(host: &HostFacts, findings: &mut Vec<CheckFinding>) {
    let record = &host.record;
    let object = CheckedObject::new("host", &record.uuid, &record.name_label);
    let name = &record.name_label;
    if !host.live {
        findings.push(CheckFinding::new(
            Severity::Warning,
            "host-down",
            object,
            format!("host {name:?} is down"),
            "disks on its local storage can not be backed up, and the others read through fewer hosts",
            format!(
                "start it (`xe host-power-on uuid={0}` where power-on is set up); if it is gone for ever: \
                 `xe host-forget uuid={0}`",
                record.uuid
            ),
        ));
        return;
    }
    if !record.enabled {
        findings.push(CheckFinding::new(
            Severity::Note,
            "host-disabled",
            object.clone(),
            format!("host {name:?} is in maintenance"),
            "no VM starts on it",
            format!("`xe host-enable uuid={}` when the maintenance is over", record.uuid),
        ));
    }
    if let Some(failure) = &host.unreachable {
        findings.push(CheckFinding::new(
            Severity::Error,
            "host-unreachable",
            object.clone(),
            format!("the API port of host {name:?} ({}) can not be reached from here: {failure}", record.address),
            "transfers over HTTP to it fail, and the pool can not be followed to it when it becomes the coordinator",
            format!(
                "open the route from this machine to {}, and the port of the API in the firewalls between",
                record.address
            ),
        ));
    }
    if let Some(ahead) = host.clock_ahead.filter(|ahead| ahead.unsigned_abs() > CLOCK_LIMIT_SECONDS) {
        let direction = if ahead > 0 { "ahead of" } else { "behind" };
        findings.push(CheckFinding::new(
            Severity::Warning,
            "clock",
            object,
            format!("the clock of host {name:?} is {} s {direction} this machine's", ahead.unsigned_abs()),
            "times of points and ages of left-overs are told wrongly, and certificates can seem out of date",
            "set the time of whichever is wrong; on the host: `systemctl restart chronyd && chronyc makestep`",
        ));
    }
}

fn networks(facts: &Facts, consent: ClearText, findings: &mut Vec<CheckFinding>) {
    if let Some(why) = &facts.without_nbd {
        findings.push(CheckFinding::new(
            Severity::Warning,
            FindingKind::NbdUnsupported.code(),
            pool_object(facts),
            why.clone(),
            "every backup reads whole disks over HTTP, and reads only a part of each again to check it",
            "upgrade all hosts to a release with NBD: XenServer 7.3, XCP-ng 7.4, or later",
        ));
    } else if let Err(finding) = access(facts.networks.values(), consent) {
        let about = facts.networks.values().find(|record| match finding.kind {
            FindingKind::NbdNotEnabled => !record.pifs.is_empty(),
            _ => record.purpose.contains(&network::Purpose::InsecureNbd),
        });
        let object = about.map_or_else(
            || pool_object(facts),
            |record| CheckedObject::new("network", &record.uuid, &record.name_label),
        );
        findings.push(CheckFinding::stopping(finding, object));
    }
    // One host that can be reached serves all disks that it sees; a host that can not is a loss, not the end.
    let severity =
        if facts.nbd.iter().any(|fact| fact.failure.is_none()) { Severity::Warning } else { Severity::Error };
    for fact in &facts.nbd {
        let Some(failure) = &fact.failure else { continue };
        let ip = fact.address.ip().to_string();
        let pif = facts.pifs.values().find(|pif| pif.ip == ip || pif.ipv6.iter().any(|known| known.starts_with(&ip)));
        let host = pif.and_then(|pif| facts.hosts.get(&pif.host));
        let object = match host {
            Some(host) => CheckedObject::new("host", &host.record.uuid, &host.record.name_label),
            None => CheckedObject::new("host", "", &ip),
        };
        // Nobody serves IPv6 (X24): worth knowing where there is nothing else, and no more than that.
        let severity = if fact.address.is_ipv6() { Severity::Note } else { severity };
        findings.push(CheckFinding::new(
            severity,
            "nbd-unreachable",
            object,
            format!("NBD at {} can not be used from here: {failure}", fact.address),
            "disks are not read through this address",
            format!(
                "open the way from this machine to {} (routes, firewalls), and look at the service there: `systemctl \
                 status xapi-nbd`; purposes of networks take some seconds to reach a host's firewall",
                fact.address
            ),
        ));
    }
}

fn storage(facts: &Facts, findings: &mut Vec<CheckFinding>) {
    for (reference, record) in &facts.srs {
        if record.content_type == "iso" || record.is_tools_sr {
            continue;
        }
        let pbds: Vec<_> = facts.pbds.values().filter(|pbd| pbd.sr == *reference).collect();
        let apart: Vec<_> = pbds.iter().filter(|pbd| !pbd.currently_attached).collect();
        let object = CheckedObject::new("SR", &record.uuid, &record.name_label);
        let used = facts.vms.iter().flat_map(|vm| &vm.disks).any(|disk| disk.record.sr == *reference);
        let commands: Vec<String> = apart.iter().map(|pbd| format!("`xe pbd-plug uuid={}`", pbd.uuid)).collect();
        if apart.len() == pbds.len() {
            let mut finding = CheckFinding::stopping(unplugged(record), object);
            if !commands.is_empty() {
                finding.remedy = format!("repair it with {}", commands.join(" or "));
            }
            if !used {
                finding.severity = Severity::Note;
                finding.consequence = "its disks can be neither read nor written".to_owned();
            }
            findings.push(finding);
        } else if !apart.is_empty() {
            let names: Vec<&str> = apart
                .iter()
                .map(|pbd| facts.hosts.get(&pbd.host).map_or("an unknown host", |host| &host.record.name_label))
                .collect();
            findings.push(CheckFinding::new(
                Severity::Warning,
                "sr-partly-unplugged",
                object,
                format!("SR {:?} is not plugged on {}", record.name_label, names.join(", ")),
                "its disks are not read through those hosts",
                commands.join(", "),
            ));
        }
    }
}

fn orphans(facts: &Facts, findings: &mut Vec<CheckFinding>) {
    for item in &facts.sweep.remove {
        findings.push(CheckFinding::new(
            Severity::Warning,
            "orphan",
            CheckedObject::new(&item.kind.to_string(), &item.uuid, &item.name),
            format!("a dead run of this installation left {} {:?}: {}", item.kind, item.name, item.reason),
            "it holds space and makes chains longer until it is removed",
            "run `xenvault-datamover sweep`; the next backup of the VM does it too",
        ));
    }
}
