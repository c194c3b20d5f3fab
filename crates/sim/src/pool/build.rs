//! Makes a pool's objects from its options.

use std::net::Ipv4Addr;

use super::certificate;
use crate::core::{HostNode, HostParts};
use crate::methods;
use crate::model::{Database, NULL, Value, date_text, new_uuid};
use crate::{NbdAccess, SimError, SimOptions};

/// Restrictions that a free licence knows.
const RESTRICTIONS: &[&str] = &[
    "restrict_vlan",
    "restrict_qos",
    "restrict_pool_attached_storage",
    "restrict_pooling",
    "restrict_rbac",
    "restrict_checkpoint",
    "restrict_vmss",
    "restrict_gpu",
    "restrict_dr",
    "restrict_storage_xen_motion",
    "restrict_xen_motion",
    "restrict_live_patching",
    "restrict_cbt",
    "restrict_usb_passthrough",
    "restrict_network_sriov",
    "restrict_corosync",
    "restrict_zstd_export",
    "restrict_vtpm",
    "restrict_vm_groups",
];

/// A colon between every two digits, as the data model writes fingerprints.
fn with_colons(fingerprint: &str) -> String {
    let mut text = String::new();
    for (index, character) in fingerprint.chars().enumerate() {
        if index > 0 && index % 2 == 0 {
            text.push(':');
        }
        text.push(character.to_ascii_uppercase());
    }
    text
}

/// Hosts, networks, pool and licences.
pub(super) fn hosts(options: &SimOptions, db: &mut Database) -> Result<Vec<HostNode>, SimError> {
    if options.hosts == 0 || options.hosts > 64 {
        return Err(SimError::Options(format!("{} hosts: 1 to 64 are possible", options.hosts)));
    }
    let restrictions = restrictions(options);
    let network = db.create(
        "network",
        vec![
            ("name_label", "Pool-wide network associated with eth0".into()),
            ("bridge", "xenbr0".into()),
            ("MTU", Value::Int(1500)),
            ("purpose", Value::texts(purposes(options.nbd))),
        ],
    );
    db.create(
        "network",
        vec![
            ("name_label", "Host internal management network".into()),
            ("bridge", "xenapi".into()),
            ("MTU", Value::Int(1500)),
            ("other_config", Value::map([("is_host_internal_management_network", "true")])),
        ],
    );
    let mut nodes = Vec::new();
    for index in 0..options.hosts {
        let last = u8::try_from(index + 1).unwrap_or(u8::MAX);
        let address = Ipv4Addr::new(127, 0, 0, last);
        let node = host(db, index, address, &restrictions, &network, options.older_server, options.ipv6)?;
        nodes.push(node);
    }
    let master = nodes.first().map(|node| node.reference.clone()).unwrap_or_default();
    db.create(
        "pool",
        vec![
            ("name_label", "simulated pool".into()),
            ("master", master.into()),
            ("restrictions", restrictions),
            ("ha_cluster_stack", "xhad".into()),
            ("coordinator_bias", true.into()),
            ("allowed_operations", Value::texts(["ha_enable", "designate_new_master", "eject"])),
        ],
    );
    Ok(nodes)
}

fn restrictions(options: &SimOptions) -> Value {
    let mut names: Vec<String> = RESTRICTIONS.iter().map(|name| (*name).to_owned()).collect();
    names.extend(options.restrictions.iter().filter(|name| !RESTRICTIONS.contains(&name.as_str())).cloned());
    Value::map(names.into_iter().map(|name| {
        let value = if options.restrictions.contains(&name) { "true" } else { "false" };
        (name, value)
    }))
}

pub(super) fn purposes(access: NbdAccess) -> Vec<&'static str> {
    match access {
        NbdAccess::Off => vec![],
        NbdAccess::Tls => vec!["nbd"],
        NbdAccess::Insecure => vec!["insecure_nbd"],
    }
}

fn host(
    db: &mut Database,
    index: usize,
    address: Ipv4Addr,
    restrictions: &Value,
    network: &str,
    older: bool,
    ipv6: bool,
) -> Result<HostNode, SimError> {
    let name = format!("host-{}", index + 1);
    let identity = certificate::make(index, &name, address)?;
    let uuid = uuid::Uuid::new_v4();
    let booted = jiff::Timestamp::now().as_second() - 86_400;
    let version = if older { "7.1.0" } else { "8.4.0" };
    let metrics = db.create(
        "host_metrics",
        vec![
            ("memory_total", Value::Int(64 << 30)),
            ("memory_free", Value::Int(48 << 30)),
            ("live", true.into()),
            ("last_updated", Value::Date(crate::model::now())),
        ],
    );
    let reference = db.create(
        "host",
        vec![
            ("uuid", uuid.to_string().into()),
            ("name_label", name.as_str().into()),
            ("name_description", "Default install".into()),
            ("hostname", name.as_str().into()),
            ("address", address.to_string().into()),
            ("metrics", metrics.into()),
            ("enabled", true.into()),
            ("API_version_major", Value::Int(2)),
            ("API_version_minor", Value::Int(if older { 7 } else { 21 })),
            ("API_version_vendor", "XenSource".into()),
            ("software_version", software(version, &name)),
            (
                "other_config",
                Value::map([("agent_start_time", format!("{}.", booted + 60)), ("boot_time", format!("{booted}."))]),
            ),
            ("capabilities", Value::texts(["xen-3.0-x86_64", "hvm-3.0-x86_64"])),
            ("sched_policy", "credit".into()),
            ("supported_bootloaders", Value::texts(["pygrub", "eliloader"])),
            ("cpu_info", Value::map([("cpu_count", "8"), ("socket_count", "1"), ("vendor", "GenuineIntel")])),
            ("license_params", restrictions.clone()),
            ("license_server", Value::map([("address", "localhost"), ("port", "27000")])),
            ("edition", "free".into()),
            ("editions", Value::texts(["free"])),
            ("virtual_hardware_platform_versions", Value::List(vec![Value::Int(0), Value::Int(1), Value::Int(2)])),
            ("bios_strings", Value::map([("bios-vendor", "Simulated"), ("bios-version", "1.0")])),
            ("tls_verification_enabled", (!older).into()),
        ],
    );
    let control_domain = control_domain(db, &name, &reference);
    db.set("host", &reference, "control_domain", control_domain.as_str());
    db.create(
        "PIF",
        vec![
            ("device", "eth0".into()),
            ("network", network.into()),
            ("host", reference.as_str().into()),
            ("MAC", format!("00:00:5e:00:53:{:02x}", index + 1).into()),
            ("currently_attached", true.into()),
            ("management", true.into()),
            ("physical", true.into()),
            ("ip_configuration_mode", "Static".into()),
            ("ipv6_configuration_mode", if ipv6 { "Static".into() } else { "None".into() }),
            ("IPv6", Value::texts(if ipv6 { vec![format!("2001:db8::{:x}", index + 1)] } else { Vec::new() })),
            ("IP", address.to_string().into()),
            ("netmask", "255.0.0.0".into()),
        ],
    );
    db.create(
        "Certificate",
        vec![
            ("host", reference.as_str().into()),
            ("type", "host".into()),
            ("not_before", Value::Date(date_text(jiff::Timestamp::now()))),
            ("not_after", Value::Date("20361119T18:35:49Z".to_owned())),
            ("fingerprint", with_colons(&certificate::fingerprint(&identity.certificate)).into()),
            ("fingerprint_sha256", with_colons(&certificate::fingerprint(&identity.certificate)).into()),
            ("fingerprint_sha1", with_colons(&certificate::fingerprint_sha1(&identity.certificate)).into()),
        ],
    );
    Ok(HostNode::new(HostParts {
        reference,
        uuid,
        address,
        certificate: identity.certificate,
        certificate_pem: identity.pem,
        key: identity.key,
        subject: identity.subject,
        control_domain,
    }))
}

fn software(version: &str, name: &str) -> Value {
    Value::map([
        ("product_version", version),
        ("product_version_text", version),
        ("product_version_text_short", version),
        ("platform_name", "XCP"),
        ("platform_version", "3.4.0"),
        ("product_brand", "XenServer"),
        ("build_number", "simulated"),
        ("hostname", name),
        ("date", "20260724T00:00:00Z"),
        ("xapi", "26.1"),
        ("xapi_build", "26.1.19"),
        ("xen", "4.17.5"),
        ("linux", "4.19.0"),
        ("xencenter_min", "2.21"),
        ("xencenter_max", "2.21"),
        ("network_backend", "openvswitch"),
        ("db_schema", "5.798"),
    ])
}

fn control_domain(db: &mut Database, name: &str, host: &str) -> String {
    let metrics = db.create("VM_metrics", vec![("start_time", Value::Date(crate::model::now()))]);
    db.create(
        "VM",
        vec![
            ("name_label", format!("Control domain on host: {name}").into()),
            ("name_description", "The domain which manages physical devices and manages other domains".into()),
            ("is_control_domain", true.into()),
            ("power_state", "Running".into()),
            ("resident_on", host.into()),
            ("affinity", host.into()),
            ("domid", Value::Int(0)),
            ("memory_static_max", Value::Int(4 << 30)),
            ("memory_dynamic_max", Value::Int(4 << 30)),
            ("memory_dynamic_min", Value::Int(4 << 30)),
            ("memory_static_min", Value::Int(4 << 30)),
            ("VCPUs_max", Value::Int(4)),
            ("VCPUs_at_startup", Value::Int(4)),
            ("domain_type", "pv".into()),
            ("metrics", metrics.into()),
        ],
    )
}

/// One SR with its driver and its connections.
pub(super) fn sr(
    db: &mut Database,
    nodes: &[HostNode],
    spec: &crate::SrSpec,
    uuid: uuid::Uuid,
) -> Result<String, SimError> {
    if spec.local_to.iter().chain(&spec.seen_by).any(|host| *host >= nodes.len()) {
        return Err(SimError::Options(format!("SR {:?} is seen by a host that is not there", spec.name)));
    }
    let kind = spec.kind.sm_type();
    driver(db, kind, methods::features(spec.kind));
    let sr = db.create(
        "SR",
        vec![
            ("uuid", uuid.to_string().into()),
            ("name_label", spec.name.as_str().into()),
            ("type", kind.into()),
            ("content_type", "user".into()),
            ("shared", spec.local_to.is_none().into()),
            ("physical_size", spec.size.into()),
            ("sm_config", Value::map(spec.kind.allocation().map(|kind| ("allocation", kind)))),
        ],
    );
    let seen = |index: usize| match spec.local_to {
        Some(host) => host == index,
        None => spec.seen_by.is_empty() || spec.seen_by.contains(&index),
    };
    connect(db, nodes, &sr, seen);
    Ok(sr)
}

fn driver(db: &mut Database, kind: &str, features: Vec<&'static str>) {
    if !db.refs_where("SM", "type", kind).is_empty() {
        return;
    }
    // Real drivers declare `VDI_RESET_ON_BOOT/2`, and every other feature in its first version.
    let version = |feature: &str| if feature == "VDI_RESET_ON_BOOT" { 2 } else { 1 };
    let numbered = features.iter().map(|feature| ((*feature).to_owned(), Value::Int(version(feature)))).collect();
    db.create(
        "SM",
        vec![
            ("name_label", format!("Simulated {kind}").into()),
            ("type", kind.into()),
            ("vendor", "Citrix Systems Inc".into()),
            ("version", "1.0".into()),
            ("capabilities", Value::texts(features)),
            ("features", Value::Map(numbered)),
        ],
    );
}

fn connect(db: &mut Database, nodes: &[HostNode], sr: &str, seen: impl Fn(usize) -> bool) {
    for (index, node) in nodes.iter().enumerate() {
        if !seen(index) {
            continue;
        }
        let record = vec![
            ("host", node.reference.as_str().into()),
            ("SR", sr.into()),
            ("currently_attached", true.into()),
            ("device_config", Value::map([("device", "/dev/sda3")])),
        ];
        db.create("PBD", record);
    }
}

/// The library of discs, with one disc.
pub(super) fn discs(db: &mut Database, nodes: &[HostNode]) -> String {
    driver(db, "iso", vec!["SR_PROBE", "VDI_ATTACH", "VDI_DETACH"]);
    let sr = db.create(
        "SR",
        vec![
            ("name_label", "discs".into()),
            ("type", "iso".into()),
            ("content_type", "iso".into()),
            ("shared", true.into()),
        ],
    );
    connect(db, nodes, &sr, |_| true);
    let uuid = new_uuid();
    db.create(
        "VDI",
        vec![
            ("uuid", uuid.into()),
            ("name_label", "install.iso".into()),
            ("location", "install.iso".into()),
            ("SR", sr.into()),
            ("virtual_size", Value::Int(64 << 20)),
            ("read_only", true.into()),
        ],
    )
}

/// A halted VM without devices.
pub(super) fn vm(db: &mut Database, name: &str) -> String {
    let metrics = db.create("VM_metrics", vec![("VCPUs_number", Value::Int(1))]);
    db.create(
        "VM",
        vec![
            ("name_label", name.into()),
            ("memory_static_max", Value::Int(512 << 20)),
            ("memory_dynamic_max", Value::Int(512 << 20)),
            ("memory_dynamic_min", Value::Int(512 << 20)),
            ("memory_static_min", Value::Int(256 << 20)),
            ("memory_overhead", Value::Int(5 << 20)),
            ("VCPUs_max", Value::Int(2)),
            ("VCPUs_at_startup", Value::Int(1)),
            ("HVM_boot_policy", "BIOS order".into()),
            ("HVM_boot_params", Value::map([("order", "cd"), ("firmware", "bios")])),
            ("platform", Value::map([("acpi", "1"), ("apic", "true"), ("nx", "true"), ("pae", "true")])),
            ("other_config", Value::map([("mac_seed", new_uuid())])),
            ("domain_type", "hvm".into()),
            ("hardware_platform_version", Value::Int(2)),
            ("metrics", metrics.into()),
            ("suspend_SR", NULL.into()),
        ],
    )
}

/// A device of a VM.
pub(super) fn device(db: &mut Database, vm: &str, vdi: &str, number: usize, disc: bool) -> String {
    let metrics = db.create("VBD_metrics", Vec::new());
    db.create(
        "VBD",
        vec![
            ("VM", vm.into()),
            ("VDI", vdi.into()),
            ("userdevice", number.to_string().into()),
            ("bootable", (number == 0).into()),
            ("mode", if disc { "RO".into() } else { "RW".into() }),
            ("type", if disc { "CD".into() } else { "Disk".into() }),
            ("metrics", metrics.into()),
        ],
    )
}

/// A network interface of a VM on the first network.
pub(super) fn interface(db: &mut Database, vm: &str, number: usize) -> String {
    let network = db
        .refs("network")
        .into_iter()
        .find(|network| db.text("network", network, "bridge") == "xenbr0")
        .unwrap_or_default();
    let count = db.count("VIF");
    db.create(
        "VIF",
        vec![
            ("VM", vm.into()),
            ("network", network.into()),
            ("device", number.to_string().into()),
            ("MAC", format!("02:00:00:00:{:02x}:{:02x}", (count >> 8) & 255, count & 255).into()),
        ],
    )
}
