//! What a server is, and what it can not do: the way in which an older server, a smaller licence or simple storage says
//! no, in a form that a caller can act on and an operator understands.

use crate::error::ApiFailure;
use crate::generated::ErrorCode;
use std::collections::BTreeMap;
use std::fmt;

/// Product and version of a server, as its coordinator tells them (`host.software_version`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerVersion {
    /// `XenServer`, `XCP-ng`, `Citrix Hypervisor`; empty if it is not known.
    pub product: String,
    /// Such as `8.2.1`; empty if it is not known.
    pub version: String,
}

impl ServerVersion {
    /// From `host.software_version`. Old servers leave entries out, and some leave them empty.
    pub(crate) fn of(software: &BTreeMap<String, String>) -> Self {
        let first = |names: &[&str]| {
            let mut texts = names.iter().filter_map(|name| software.get(*name)).map(|text| text.trim());
            texts.find(|text| !text.is_empty()).unwrap_or_default().to_owned()
        };
        Self {
            product: first(&["product_brand", "platform_name"]),
            version: first(&["product_version", "product_version_text", "platform_version"]),
        }
    }
}

impl fmt::Display for ServerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.product.as_str(), self.version.as_str()) {
            ("", "") => f.write_str("a server of unknown version"),
            ("", version) => write!(f, "version {version}"),
            (product, "") => f.write_str(product),
            (product, version) => write!(f, "{product} {version}"),
        }
    }
}

/// What is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Missing {
    /// The server has no such method (or not with these parameters, or not the work behind it).
    Method(String),
    /// The licence leaves a feature out.
    Feature(String),
    /// The type of the SR can not do this operation.
    StorageOperation(String),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Method(name) => write!(f, "it does not have the method {name}"),
            Self::Feature(name) => write!(f, "its licence does not include {name}"),
            Self::StorageOperation(name) => write!(f, "the type of the SR can not do {name}"),
        }
    }
}

/// A call that is not supported here: what is missing, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// The call.
    pub operation: String,
    /// What is missing.
    pub missing: Missing,
    /// The server that was asked.
    pub server: ServerVersion,
    /// What the pool said.
    pub failure: ApiFailure,
}

impl Unsupported {
    pub(crate) fn new(operation: String, failure: ApiFailure, server: ServerVersion) -> Self {
        // Tasks are named in words, calls by their method; the pool names a method or a feature itself, if it can.
        let said = failure.params.iter().find(|param| !param.is_empty() && !param.starts_with("OpaqueRef:"));
        let named = || said.cloned().unwrap_or_else(|| operation.clone());
        let method = || operation.strip_prefix("Async.").unwrap_or(&operation).to_owned();
        let missing = match failure.code {
            ErrorCode::MessageMethodUnknown | ErrorCode::MessageRemoved => Missing::Method(named()),
            ErrorCode::LicenseRestriction | ErrorCode::LicenceRestriction | ErrorCode::FeatureRestricted => {
                Missing::Feature(named())
            }
            ErrorCode::SrOperationNotSupported | ErrorCode::UnimplementedInSmBackend => {
                Missing::StorageOperation(method())
            }
            _ => match (failure.sr_backend_failure(), failure.code.as_str()) {
                (Some(454), _) => Missing::Feature("SMB storage".to_owned()),
                (Some(_), _) => Missing::StorageOperation(method()),
                (None, "LICENSE_EXPIRED") => Missing::Feature(method()),
                (None, _) => Missing::Method(method()),
            },
        };
        Self { operation, missing, server, failure }
    }
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, missing, server, failure } = self;
        write!(f, "{operation}: not supported by this pool ({server}): {missing} ({failure})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(parts: &[&str]) -> String {
        let software = [("product_brand", "XenServer"), ("product_version", "7.1.0")];
        let server = ServerVersion::of(&software.map(|(name, text)| (name.to_owned(), text.to_owned())).into());
        let failure = ApiFailure::from_description(parts.iter().map(|part| (*part).to_owned()).collect());
        Unsupported::new("Async.VDI.enable_cbt".to_owned(), failure, server).to_string()
    }

    #[test]
    fn texts_name_what_is_missing_and_the_server() {
        assert_eq!(
            said(&["MESSAGE_METHOD_UNKNOWN", "VDI.enable_cbt"]),
            "Async.VDI.enable_cbt: not supported by this pool (XenServer 7.1.0): it does not have the method VDI.enable_cbt \
             (MESSAGE_METHOD_UNKNOWN: VDI.enable_cbt)"
        );
        assert!(said(&["LICENSE_RESTRICTION", "CBT"]).contains("its licence does not include CBT"));
        assert!(said(&["SR_OPERATION_NOT_SUPPORTED", "OpaqueRef:1"]).contains("the SR can not do VDI.enable_cbt"));
        assert!(said(&["SR_BACKEND_FAILURE_38", "", "x", ""]).contains("the SR can not do VDI.enable_cbt"));
        assert!(said(&["SR_BACKEND_FAILURE_454", "", "x", ""]).contains("SMB storage"));
        assert!(said(&["NOT_IMPLEMENTED", "x"]).contains("the method VDI.enable_cbt"));
    }

    #[test]
    fn servers_that_tell_little_are_still_named() {
        let of = |entries: &[(&str, &str)]| {
            let software = entries.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
            ServerVersion::of(&software).to_string()
        };
        assert_eq!(of(&[]), "a server of unknown version");
        assert_eq!(of(&[("product_brand", ""), ("platform_name", "XCP"), ("platform_version", "2.6.0")]), "XCP 2.6.0");
        assert_eq!(of(&[("product_version", "6.5.0")]), "version 6.5.0");
    }
}
