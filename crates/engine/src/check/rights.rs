//! The calls of ours that not every role may make, with the least role of each (XenAPI's static table of rights, RBAC).
//!
//! Tests hold the table to the calls that the sources of this crate and of `xenvault-xenapi` make, to the data model of
//! a real xapi, and to `docs/xenapi.md`.

use std::fmt;

/// XenAPI's roles, each with all rights of those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    VmOperator,
    VmAdmin,
    VmPowerAdmin,
    PoolOperator,
    PoolAdmin,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::VmOperator => "vm-operator",
            Self::VmAdmin => "vm-admin",
            Self::VmPowerAdmin => "vm-power-admin",
            Self::PoolOperator => "pool-operator",
            Self::PoolAdmin => "pool-admin",
        })
    }
}

/// What fails without a right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Backups.
    Backup,
    /// Restores.
    Restore,
    /// Both.
    Both,
    /// Nothing: what then happens instead.
    Less(&'static str),
}

impl Need {
    pub(super) fn for_backup(self) -> bool {
        matches!(self, Self::Backup | Self::Both)
    }

    pub(super) fn for_restore(self) -> bool {
        matches!(self, Self::Restore | Self::Both)
    }
}

/// One call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Right {
    /// As `docs/xenapi.md` writes it: `VM.snapshot`, or `GET /export_raw_vdi`.
    pub(super) call: &'static str,
    pub(super) role: Role,
    pub(super) need: Need,
    /// A server from before changed block tracking and NBD does not have it, and is backed up without it.
    pub(super) newer: bool,
}

const fn right(call: &'static str, role: Role, need: Need) -> Right {
    Right { call, role, need, newer: false }
}

const fn newer(call: &'static str, role: Role, need: Need) -> Right {
    Right { call, role, need, newer: true }
}

/// Every call that the least role, `read-only`, may not make.
pub(super) const RIGHTS: &[Right] = &[
    right("VM.snapshot", Role::VmPowerAdmin, Need::Backup),
    right("VM.set_other_config", Role::VmAdmin, Need::Both),
    right("VM.destroy", Role::VmAdmin, Need::Both),
    right("VDI.set_other_config", Role::VmAdmin, Need::Both),
    right("VDI.add_to_other_config", Role::VmAdmin, Need::Backup),
    right("VDI.remove_from_other_config", Role::VmAdmin, Need::Backup),
    right("VDI.destroy", Role::VmAdmin, Need::Both),
    newer("VDI.enable_cbt", Role::VmAdmin, Need::Backup),
    newer("VDI.disable_cbt", Role::VmAdmin, Need::Backup),
    newer("VDI.list_changed_blocks", Role::VmOperator, Need::Backup),
    newer("VDI.data_destroy", Role::VmAdmin, Need::Backup),
    newer("VDI.get_nbd_info", Role::VmAdmin, Need::Backup),
    right("GET /export_raw_vdi", Role::VmAdmin, Need::Backup),
    right(
        "VM.update_allowed_operations",
        Role::PoolAdmin,
        Need::Less("the list of what a VM allows counts as it is, and can be out of date"),
    ),
    right("VM.create", Role::VmAdmin, Need::Restore),
    right("VDI.create", Role::VmAdmin, Need::Restore),
    right("VBD.create", Role::VmAdmin, Need::Restore),
    right("VIF.create", Role::VmAdmin, Need::Restore),
    right("PUT /import_raw_vdi", Role::VmAdmin, Need::Restore),
    right("VM.set_memory_limits", Role::VmPowerAdmin, Need::Restore),
    right("VM.set_name_label", Role::VmAdmin, Need::Restore),
    right("VDI.set_name_label", Role::VmAdmin, Need::Restore),
    right("VM.set_blocked_operations", Role::VmAdmin, Need::Restore),
    right("VM.set_bios_strings", Role::VmAdmin, Need::Less("a restored VM gets no BIOS strings")),
    right("VTPM.create", Role::VmAdmin, Need::Less("a restored VM gets no TPM")),
    right(
        "VM.set_ha_restart_priority",
        Role::PoolOperator,
        Need::Less("a restored VM does not get its priority for high availability back"),
    ),
];

impl Right {
    /// The name of the right in a session's list.
    pub(super) fn permission(&self) -> String {
        let http = |verb: &str| self.call.strip_prefix(verb).map(str::to_owned);
        let name = http("GET /")
            .map(|handler| format!("http/get_{handler}"))
            .or_else(|| http("PUT /").map(|handler| format!("http/put_{handler}")));
        name.unwrap_or_else(|| self.call.to_lowercase())
    }
}

/// The least role that has all of these; `None` if every role has.
pub(super) fn least_role<'a>(rights: impl IntoIterator<Item = &'a Right>) -> Option<Role> {
    rights.into_iter().map(|right| right.role).max()
}

#[cfg(test)]
#[path = "rights_tests.rs"]
mod tests;
