//! The command lines themselves: what `--help` promises, what the README says, what must never be an argument.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test ends with a panic, and its helpers too")]

use std::path::Path;
use xenvault_tests::programs::{self, Finished};

/// Both programs and their commands.
const COMMANDS: [(&str, &[&str]); 2] = [
    ("xenvault-datamover", &["init-repository", "pin", "backup", "check", "sweep"]),
    ("xenvault-restore", &["points", "show", "vm", "disk", "point", "sweep", "verify", "repair"]),
];

fn run(program: &str, arguments: &[&str]) -> Finished {
    programs::finish(programs::program(program).unwrap().args(arguments), "").unwrap()
}

#[test]
fn the_exit_codes_of_help_are_those_of_the_readme() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    let documented: Vec<String> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |")?.split_once(" | "))
        .filter(|(code, _)| code.parse::<u8>().is_ok())
        .map(|(code, meaning)| format!("{code}  {meaning}"))
        .collect();
    assert_eq!(documented.len(), 13);
    for (program, _) in COMMANDS {
        let help = run(program, &["--help"]).stdout;
        let (_, table) = help.split_once("Exit codes:\n").unwrap();
        let told: Vec<String> =
            table.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect();
        assert_eq!(told, documented, "{program}");
    }
}

#[test]
fn every_command_explains_itself_and_takes_no_secret() {
    for (program, commands) in COMMANDS {
        for command in commands {
            let help = run(program, &[command, "--help"]);
            assert_eq!(help.code, Some(0), "{help:?}");
            assert!(!help.stdout.contains("--password ") && !help.stdout.contains("--passphrase "), "{help:?}");
        }
    }
}

#[test]
fn bad_arguments_are_code_2() {
    for (program, commands) in COMMANDS {
        assert_eq!(run(program, &[]).code, Some(2));
        assert_eq!(run(program, &["no-such-command"]).code, Some(2));
        for command in commands {
            assert_eq!(run(program, &[command, "--no-such-option"]).code, Some(2));
        }
    }
    let finished = run("xenvault-datamover", &["backup", "--password", "secret"]);
    assert_eq!(finished.code, Some(2));
}

#[test]
fn a_missing_secret_file_is_code_2_and_named() {
    let finished =
        run("xenvault-restore", &["points", "--repository", "/no/such", "--passphrase-file", "/no/such/passphrase"]);
    assert_eq!(finished.code, Some(2), "{finished:?}");
    assert!(finished.stderr.contains("/no/such/passphrase"), "{finished:?}");
}
