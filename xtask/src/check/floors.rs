//! Holds the packages of the workspace against the table of floors in the root manifest.
//!
//! The table stands once, under `[workspace.metadata.floors]`; `docs/architecture.md` says what it means. The rules are
//! a pure function from `cargo metadata` to a list of findings, so that they are tested without cargo.

use crate::run::{Outcome, cargo, output};
use serde::Deserialize;
use std::collections::BTreeMap;

/// What `cargo metadata --no-deps` tells, as far as we look at it.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_root: String,
    metadata: Option<WorkspaceMetadata>,
}

#[derive(Debug, Deserialize)]
struct WorkspaceMetadata {
    floors: Option<Floors>,
}

/// The table in the root manifest.
#[derive(Debug, Default, Deserialize)]
struct Floors {
    /// Floor of each crate, by its folder under `crates/`.
    crates: BTreeMap<String, u32>,
    /// Crates for tests and the demo only, with the crates that they may use.
    dev: BTreeMap<String, Vec<String>>,
    /// External packages that only the named crates may use (normal dependencies).
    owners: BTreeMap<String, Vec<String>>,
    /// External packages that pure crates (floors 0 and 1) must not know.
    impure: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    manifest_path: String,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    /// `None` for a normal dependency, else `dev` or `build`.
    kind: Option<String>,
}

/// Where a package stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place<'a> {
    /// A library crate on a floor.
    Floor(u32),
    /// A double for tests, with what it may use.
    Dev(&'a [String]),
    /// A program under `bins/`.
    Program,
    /// `xtask` and `tests`: may use anything.
    Tool,
}

/// The highest floor whose crates are pure: no async, no I/O of their own.
const HIGHEST_PURE_FLOOR: u32 = 1;

/// Asks cargo and reports every package that stands on the wrong floor.
///
/// # Errors
/// One line a finding.
pub fn check() -> Outcome {
    let json = output(cargo().args(["metadata", "--format-version", "1", "--no-deps"]))?;
    let metadata: Metadata = serde_json::from_slice(&json)?;
    let findings = findings(&metadata);
    if findings.is_empty() {
        println!("{} packages stand where the table says", metadata.packages.len());
        return Ok(());
    }
    Err(findings.join("\n").into())
}

fn findings(metadata: &Metadata) -> Vec<String> {
    let Some(floors) = metadata.metadata.as_ref().and_then(|metadata| metadata.floors.as_ref()) else {
        return vec!["the root manifest has no [workspace.metadata.floors]".to_owned()];
    };
    let mut findings = Vec::new();
    let mut places = BTreeMap::new();
    for package in &metadata.packages {
        match place(package, &metadata.workspace_root, floors) {
            Ok(place) => {
                places.insert(package.name.as_str(), place);
            }
            Err(finding) => findings.push(finding),
        }
    }
    for package in &metadata.packages {
        let Some(user) = places.get(package.name.as_str()) else { continue };
        for dependency in &package.dependencies {
            let used = places.get(dependency.name.as_str()).copied();
            let finding = match used {
                Some(used) => internal(*user, used, dependency),
                None => external(*user, &package.name, dependency, floors),
            };
            if let Some(rule) = finding {
                findings.push(format!("{} must not use {}: {rule}", package.name, dependency.name));
            }
        }
    }
    findings
}

/// Where a package stands, from its folder; its name must follow from the folder.
fn place<'a>(package: &Package, root: &str, floors: &'a Floors) -> Result<Place<'a>, String> {
    let folder = package
        .manifest_path
        .strip_prefix(root)
        .and_then(|path| path.trim_start_matches('/').strip_suffix("/Cargo.toml"))
        .ok_or_else(|| format!("{} lies outside the workspace at {}", package.name, package.manifest_path))?;
    let (place, name) = match folder.split_once('/') {
        Some(("crates", name)) => {
            let place = match (floors.crates.get(name), floors.dev.get(name)) {
                (Some(floor), None) => Place::Floor(*floor),
                (None, Some(may_use)) => Place::Dev(may_use),
                (Some(_), Some(_)) => return Err(format!("crates/{name} is in the table of floors twice")),
                (None, None) => return Err(format!("crates/{name} is not in the table of floors")),
            };
            (place, name)
        }
        Some(("bins", name)) => (Place::Program, name),
        None if folder == "xtask" => return Ok(Place::Tool),
        None if folder == "tests" => (Place::Tool, folder),
        _ => return Err(format!("{folder} is no place for a package (crates/, bins/, xtask or tests)")),
    };
    if package.name == format!("xenvault-{name}") {
        return Ok(place);
    }
    Err(format!("the package in {folder} must be named xenvault-{name}, not {}", package.name))
}

/// Why a package of ours must not use another one of ours.
fn internal(user: Place<'_>, used: Place<'_>, dependency: &Dependency) -> Option<String> {
    let dev_only = dependency.kind.as_deref() == Some("dev");
    let used_name = dependency.name.trim_start_matches("xenvault-");
    match (user, used) {
        (Place::Tool, _) => None,
        (_, Place::Tool) => Some("xtask and tests are used by nobody".to_owned()),
        (_, Place::Program) => Some("a program is not a library".to_owned()),
        (Place::Dev(may_use), _) => (!may_use.iter().any(|name| name == used_name)).then(|| {
            format!("a double uses only {}, else an error on both sides would be invisible", may_use.join(", "))
        }),
        (Place::Floor(floor), Place::Dev(_)) if dev_only && floor > HIGHEST_PURE_FLOOR => None,
        (Place::Program, Place::Dev(_)) if dev_only => None,
        (_, Place::Dev(_)) => Some("doubles are for tests of floor 2 and above".to_owned()),
        (Place::Program, Place::Floor(_)) => None,
        (Place::Floor(user), Place::Floor(used)) if used < user => None,
        (Place::Floor(user), Place::Floor(used)) => {
            Some(format!("it stands on floor {used}, the user on floor {user}"))
        }
    }
}

/// Why a package of ours must not use an external one.
fn external(user: Place<'_>, name: &str, dependency: &Dependency, floors: &Floors) -> Option<String> {
    if dependency.kind.as_deref() == Some("dev") || user == Place::Tool {
        return None;
    }
    if let Some(owners) = floors.owners.get(&dependency.name)
        && !owners.iter().any(|owner| name == format!("xenvault-{owner}"))
    {
        return Some(format!("only {} may", owners.join(", ")));
    }
    match user {
        Place::Floor(floor) if floor <= HIGHEST_PURE_FLOOR && floors.impure.contains(&dependency.name) => {
            Some(format!("crates up to floor {HIGHEST_PURE_FLOOR} are pure"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The findings for a workspace with `packages` (folder, dependencies as `name` or `name:kind`).
    fn check(packages: &[(&str, &[&str])]) -> Vec<String> {
        let packages = packages
            .iter()
            .map(|(folder, dependencies)| {
                let last = folder.rsplit('/').next().unwrap();
                Package {
                    name: if last == "xtask" { last.to_owned() } else { format!("xenvault-{last}") },
                    manifest_path: format!("/w/{folder}/Cargo.toml"),
                    dependencies: dependencies
                        .iter()
                        .map(|text| {
                            let (name, kind) = text
                                .split_once(':')
                                .map_or((*text, None), |(name, kind)| (name, Some(kind.to_owned())));
                            Dependency { name: name.to_owned(), kind }
                        })
                        .collect(),
                }
            })
            .collect();
        let floors = Floors {
            crates: [("block", 0), ("cbt", 1), ("store-format", 1), ("nbd", 2), ("store", 2), ("engine", 3)]
                .map(|(name, floor)| (name.to_owned(), floor))
                .into(),
            dev: [("sim".to_owned(), vec!["block".to_owned()])].into(),
            owners: [("bincode".to_owned(), vec!["store-format".to_owned()])].into(),
            impure: vec!["tokio".to_owned()],
        };
        let metadata = Some(WorkspaceMetadata { floors: Some(floors) });
        findings(&Metadata { packages, workspace_root: "/w".to_owned(), metadata })
    }

    #[test]
    fn downwards_is_allowed() {
        let found = check(&[
            ("crates/block", &[]),
            ("crates/cbt", &["xenvault-block", "thiserror"]),
            ("crates/nbd", &["xenvault-cbt", "tokio"]),
            ("crates/engine", &["xenvault-nbd", "xenvault-block"]),
            ("bins/datamover", &["xenvault-engine", "xenvault-nbd"]),
            ("xtask", &["xenvault-engine"]),
        ]);
        assert_eq!(found, Vec::<String>::new());
    }

    #[test]
    fn a_sibling_and_a_floor_above_are_refused() {
        let found = check(&[
            ("crates/block", &["xenvault-cbt"]),
            ("crates/cbt", &[]),
            ("crates/nbd", &["xenvault-store"]),
            ("crates/store", &[]),
        ]);
        assert_eq!(
            found,
            [
                "xenvault-block must not use xenvault-cbt: it stands on floor 1, the user on floor 0",
                "xenvault-nbd must not use xenvault-store: it stands on floor 2, the user on floor 2",
            ]
        );
    }

    #[test]
    fn a_dev_dependency_is_held_to_the_same_floors() {
        assert_eq!(check(&[("crates/block", &["xenvault-cbt:dev"]), ("crates/cbt", &[])]).len(), 1);
    }

    #[test]
    fn the_double_uses_only_what_it_may() {
        let found =
            check(&[("crates/block", &[]), ("crates/nbd", &[]), ("crates/sim", &["xenvault-block", "xenvault-nbd"])]);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("xenvault-sim must not use xenvault-nbd: a double uses only block"));
    }

    #[test]
    fn the_double_is_for_tests_of_upper_floors() {
        let sim: (&str, &[&str]) = ("crates/sim", &[]);
        assert_eq!(check(&[sim, ("crates/nbd", &["xenvault-sim:dev"])]), Vec::<String>::new());
        assert_eq!(check(&[sim, ("crates/nbd", &["xenvault-sim"])]).len(), 1);
        assert_eq!(check(&[sim, ("crates/cbt", &["xenvault-sim:dev"])]).len(), 1);
        assert_eq!(check(&[sim, ("bins/datamover", &["xenvault-sim"])]).len(), 1);
        assert_eq!(check(&[sim, ("tests", &["xenvault-sim"])]), Vec::<String>::new());
    }

    #[test]
    fn an_owned_package_has_one_user() {
        let found = check(&[("crates/store-format", &["bincode"]), ("crates/store", &["bincode"])]);
        assert_eq!(found, ["xenvault-store must not use bincode: only store-format may"]);
    }

    #[test]
    fn pure_crates_know_nothing_of_async() {
        assert_eq!(
            check(&[("crates/cbt", &["tokio"])]),
            ["xenvault-cbt must not use tokio: crates up to floor 1 are pure"]
        );
    }

    #[test]
    fn an_unknown_crate_is_an_error() {
        assert_eq!(check(&[("crates/shiny", &[])]), ["crates/shiny is not in the table of floors"]);
        assert_eq!(check(&[("extra/shiny", &[])]).len(), 1);
    }

    #[test]
    fn nobody_uses_programs_or_tools() {
        let found = check(&[
            ("bins/restore", &[]),
            ("crates/engine", &["xenvault-restore"]),
            ("tests", &[]),
            ("bins/datamover", &["xenvault-tests"]),
        ]);
        assert_eq!(found.len(), 2);
    }
}
