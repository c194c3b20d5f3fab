//! Keys from the command line: a second passphrase, a recovery key, a change, a removal; every command opens with any of
//! them, and says what is wrong with one that does not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    missing_docs,
    reason = "a test ends with a panic, and its helpers too"
)]

mod common;

use common::{Bench, PASSPHRASE, assert_fails, one_vm, text};
use xenvault_tests::programs::{self, Finished};

/// Runs `xenvault-restore --json <command> --repository ...` with this passphrase, and another one as the new one.
fn with(bench: &Bench, passphrase: &str, new: &str, command: &[&str]) -> Finished {
    let mut program = bench.program("xenvault-restore");
    program.env("XENVAULT_PASSPHRASE", passphrase).env("XENVAULT_NEW_PASSPHRASE", new);
    program.arg("--json").args(command).args(bench.repository_arguments());
    programs::finish(&mut program, "").unwrap()
}

fn done(bench: &Bench, passphrase: &str, new: &str, command: &[&str]) -> serde_json::Value {
    let finished = with(bench, passphrase, new, command);
    assert_eq!(finished.code, Some(0), "{command:?}: {finished:?}");
    finished.json().unwrap()
}

#[test]
fn keys_are_added_changed_and_removed_and_every_command_opens_with_a_recovery_key() {
    let bench = Bench::start(one_vm());
    let point = bench.backup("web")["point"].as_str().unwrap().to_owned();
    let content = bench.guest_disk("web", "0", 64 << 20);

    let added = done(&bench, PASSPHRASE, "anna's passphrase", &["key", "add", "--label", "anna"]);
    let annas = added["slot"].as_str().unwrap().to_owned();
    let made = done(&bench, PASSPHRASE, "", &["key", "recovery", "--label", "safe"]);
    let recovery = made["recovery_key"].as_str().unwrap().to_owned();
    assert!(recovery.starts_with("XVRK-") && recovery.len() == 85, "{made}");

    let listed = done(&bench, "anna's passphrase", "", &["key", "list"]);
    let slots = listed["slots"].as_array().unwrap();
    assert_eq!(slots.len(), 3);
    let ours: Vec<_> = slots.iter().filter(|slot| slot["in_use"] == true).collect();
    assert_eq!((ours.len(), &ours[0]["label"], &ours[0]["slot"]), (1, &"anna".into(), &annas.clone().into()));
    assert!(!listed.to_string().contains(&recovery[5..13]), "no key is listed");

    // Every kind of command, with the recovery key as somebody types it.
    let typed = recovery.to_lowercase().replace('-', " ");
    for command in [&["points"][..], &["show", &point], &["verify", "--full"], &["sweep", "--dry-run"], &["repair"]] {
        done(&bench, &typed, "", command);
    }
    let file = bench.path("restored.raw");
    done(&bench, &typed, "", &["disk", &point, "0", "--to", &text(&file)]);
    assert!(std::fs::read(&file).unwrap() == content);
    let mut program = bench.program("xenvault-datamover");
    program.env("XENVAULT_PASSPHRASE", &recovery).arg("backup").args(bench.backup_arguments("web"));
    let finished = programs::finish(&mut program, "").unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");

    // A typing error names the group; a key of the right form that is not ours is only wrong.
    let at = 5 + 9 + 2;
    let other = if &recovery[at..=at] == "0" { "1" } else { "0" };
    let mut mistyped = recovery.clone();
    mistyped.replace_range(at..=at, other);
    assert_fails(&with(&bench, &mistyped, "", &["points"]), 7, &["group 2"]);
    assert_fails(&with(&bench, "wrong", "", &["points"]), 7, &["does not open"]);

    // Anna changes hers; the first passphrase goes.
    done(&bench, "anna's passphrase", "anna's next", &["key", "change"]);
    assert_fails(&with(&bench, "anna's passphrase", "", &["points"]), 7, &["does not open"]);
    assert_fails(&with(&bench, &recovery, "x", &["key", "change"]), 6, &["key add"]);
    assert_fails(&with(&bench, PASSPHRASE, "", &["key", "remove", "1", "--confirm"]), 6, &["opened with"]);
    assert_fails(&with(&bench, "anna's next", "", &["key", "remove", "none", "--confirm"]), 5, &["key list"]);
    assert_fails(&with(&bench, "anna's next", "", &["key", "remove", "1"]), 6, &["would go: 1", "--confirm"]);
    let shown = done(&bench, "anna's next", "", &["key", "remove", "1", "--dry-run"]);
    assert_eq!((shown["removed"].as_array().unwrap().len(), shown["staying"].as_array().unwrap().len()), (1, 2));
    done(&bench, PASSPHRASE, "", &["points"]);
    done(&bench, "anna's next", "", &["key", "remove", "1", "--confirm"]);
    assert_fails(&with(&bench, PASSPHRASE, "", &["points"]), 7, &["does not open"]);
    done(&bench, "anna's next", "", &["points"]);
    bench.assert_pool_is_clean();
}

#[test]
fn a_recovery_key_goes_to_a_file_of_its_owner_and_never_over_another_one() {
    use std::os::unix::fs::PermissionsExt as _;
    let bench = Bench::without_repository(one_vm());
    let made = bench.datamover("init-repository", &bench.repository_arguments());
    assert_eq!(made.code, Some(0), "{made:?}");
    let file = bench.path("recovery");
    let finished = with(&bench, PASSPHRASE, "", &["key", "recovery", "--to", &text(&file)]);
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let written = std::fs::read_to_string(&file).unwrap();
    assert!(written.starts_with("XVRK-") && !finished.stdout.contains("XVRK-"), "{finished:?}");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let again = with(&bench, PASSPHRASE, "", &["key", "recovery", "--to", &text(&file)]);
    assert_fails(&again, 2, &["can not be written"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), written);
    assert_eq!(done(&bench, written.trim(), "", &["key", "list"])["slots"].as_array().unwrap().len(), 2);

    // Both passphrases on one input, the present one first.
    let mut program = programs::program("xenvault-restore").unwrap();
    program.args(["key", "add", "--passphrase-file", "-", "--new-passphrase-file", "-"]);
    program.args(bench.repository_arguments());
    let finished = programs::finish(&mut program, &format!("{PASSPHRASE}\nanother one\n")).unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    done(&bench, "another one", "", &["points"]);

    // A damaged slot is named; the others go on opening.
    let key = bench.repository().join("keys/1");
    let mut bytes = std::fs::read(&key).unwrap();
    bytes[60] ^= 1;
    std::fs::write(&key, bytes).unwrap();
    let listed = with(&bench, "another one", "", &["key", "list"]);
    assert_eq!(listed.code, Some(9), "{listed:?}");
    assert!(listed.json().unwrap()["slots"].to_string().contains("damaged"), "{listed:?}");
    assert_fails(&with(&bench, PASSPHRASE, "", &["points"]), 7, &["keys/1", "damaged"]);
}
