//! The command lines themselves: what `--help` promises, what the README says, what must never be an argument.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test ends with a panic, and its helpers too")]

use std::path::Path;
use xenvault_tests::programs::{self, Finished};

/// Both programs and their commands.
const COMMANDS: [(&str, &[&str]); 2] = [
    ("xenvault-datamover", &["init-repository", "pin", "backup", "check", "sweep"]),
    (
        "xenvault-restore",
        &["points", "show", "vm", "disk", "point", "sweep", "verify", "keep", "seal", "repair", "key"],
    ),
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

/// The lines below `Example:` in a command's help.
fn examples(help: &str) -> Vec<String> {
    let (_, rest) = help.split_once("Example:\n").unwrap();
    let lines = rest.lines().take_while(|line| line.starts_with("    "));
    lines.map(|line| line.trim().to_owned()).collect()
}

#[test]
fn every_command_has_an_example_that_it_understands() {
    for (program, commands) in COMMANDS {
        for command in commands {
            let help = run(program, &[command, "--help"]).stdout;
            let examples = examples(&help);
            assert!(!examples.is_empty(), "{program} {command}");
            for example in examples {
                let words: Vec<&str> = example.split(' ').collect();
                assert_eq!((words[0], words[1]), (program, *command), "{example}");
                // Help comes before anything is done, and not before everything was understood.
                let mut tried: Vec<&str> = words[1..].to_vec();
                tried.push("--help");
                assert_eq!(run(program, &tried).code, Some(0), "{example}");
                tried.insert(1, "--no-such-option");
                assert_eq!(run(program, &tried).code, Some(2), "{example}");
            }
            assert!(help.contains(&format!("see `{program} --help`")), "{help}");
        }
    }
}

/// All Rust sources below a folder, without their tests.
fn sources(folder: &Path, into: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            into.push_str(text.split("#[cfg(test)]\nmod ").next().unwrap());
        }
    }
}

#[test]
fn the_environment_in_help_is_what_the_sources_look_at() {
    let mut text = String::new();
    for folder in ["bins/datamover/src", "bins/restore/src"] {
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder), &mut text);
    }
    let is_variable = |word: &&str| word.starts_with("XENVAULT_") && word.len() > 9;
    // Names stand in the sources as whole texts.
    let read: std::collections::BTreeSet<&str> =
        text.split('"').filter(is_variable).filter(|word| !word.contains(' ')).collect();
    assert!(read.len() >= 4, "{read:?}");
    for (program, _) in COMMANDS {
        let help = run(program, &["--help"]).stdout;
        let (_, rest) = help.split_once("Environment:\n").unwrap();
        let table = rest.split("\n\n").next().unwrap();
        let names = table.split([' ', ',', '\n']).filter(|word| is_variable(word));
        let told: std::collections::BTreeSet<&str> = names.collect();
        assert_eq!(told, read, "{program}");
        for name in ["XDG_STATE_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR"] {
            assert!(table.contains(name), "{program}: {name}");
        }
    }
}
