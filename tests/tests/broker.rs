//! The broker of a local folder against an attacker who is the datamover: its user id, its key, its own code.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test ends with a panic, and its helpers too"
)]

mod lock_support;

use lock_support::{back_up, init, noise, passphrase, read};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use xenvault_store::backend::{Backend, LocalFolder, seal_folder};
use xenvault_store::{PointFilter, Repository, SweepOptions, VerifyMode, VerifyOptions};
use xenvault_tests::programs;

/// A user that no system gives anything to.
const DATAMOVER: u32 = 65_531;

fn is_root() -> bool {
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

/// All files and folders below a folder, itself included.
fn all(folder: &Path) -> Vec<PathBuf> {
    let (mut found, mut open) = (vec![folder.to_owned()], vec![folder.to_owned()]);
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.symlink_metadata().unwrap().is_dir() {
                open.push(path.clone());
            }
            found.push(path);
        }
    }
    found
}

/// As if the datamover had written everything that is not the broker's.
fn give_to_datamover(root: &Path) {
    for path in all(root) {
        if path.symlink_metadata().unwrap().uid() == 0 {
            lchown(path, Some(DATAMOVER), Some(DATAMOVER)).unwrap();
        }
    }
}

/// A shell of the datamover's user; `$1` is the argument.
fn shell(script: &str, argument: &Path) -> Command {
    let mut command = Command::new("setpriv");
    let id = DATAMOVER.to_string();
    command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "sh", "-c", script, "sh"]).arg(argument);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

fn attack(script: &str, argument: &Path) {
    let _ = shell(script, argument).output().unwrap();
}

/// A process of the datamover that has an object open for writing from before it was sealed.
fn hold_open(object: &Path) -> Child {
    let script =
        "exec 3<>\"$1\"; echo ready; read go; echo junkjunkjunk >&3; : >/proc/self/fd/3; chmod 666 /proc/self/fd/3";
    let mut child = shell(script, object).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    child
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_broker_has_sealed_no_datamover_changes() {
    if !is_root() {
        eprintln!("not run: taking files over from another user needs root");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let root = folder.path().join("repository");
    let place: Arc<dyn Backend> = Arc::new(LocalFolder::new(&root));
    let repository = init(place.clone(), "broker").await.unwrap();
    let content = noise(1, 2 << 20);
    let point = back_up(&repository, &content).await.unwrap();
    // Everything is the datamover's, as when it runs under its own user.
    give_to_datamover(&root);
    let before = repository.protection(&point).await.unwrap();
    assert!(!before.holds() && before.sealed == 0 && before.unprotected.len() as u64 == before.objects, "{before:?}");
    let objects: Vec<PathBuf> = all(&root).into_iter().filter(|path| path.is_file()).collect();
    let pack = objects.iter().find(|path| path.starts_with(root.join("packs"))).unwrap().clone();
    let mut held = hold_open(&pack);
    let bytes: Vec<Vec<u8>> = objects.iter().map(|path| std::fs::read(path).unwrap()).collect();

    let report = seal_folder(&root, DATAMOVER).unwrap();
    assert_eq!((report.sealed, report.strange.len()), (objects.len() as u64, 0), "{report:?}");
    let after = repository.protection(&point).await.unwrap();
    assert!(after.holds() && after.sealed == after.objects, "{after:?}");
    assert_eq!(seal_folder(&root, DATAMOVER).unwrap().before, report.sealed, "sealing again changes nothing");

    held.stdin.take().unwrap().write_all(b"go\n").unwrap();
    held.wait().unwrap();
    for object in &objects {
        for script in [
            "rm -f \"$1\"",
            "echo junk >\"$1\"",
            "truncate -s 0 \"$1\"",
            "chmod 777 \"$1\"",
            "mv \"$1\" \"$1.gone\"",
            "cd \"${1%/*}\" && echo junk >junk-$$ && mv -f junk-$$ \"$1\"",
            "ln -f /etc/hostname \"$1\"",
            "chattr -i \"$1\"",
            "setfattr -n user.x -v y \"$1\"",
            "touch -d 1980-01-01 \"$1\"",
        ] {
            attack(script, object);
        }
    }
    let folders: Vec<PathBuf> = all(&root).into_iter().filter(|path| path.is_dir()).collect();
    for folder in &folders {
        for script in ["chmod 777 \"$1\"", "mv \"$1\" \"$1.gone\"", "rm -rf \"$1\"", "rmdir \"$1\""] {
            attack(script, folder);
        }
    }
    for (object, bytes) in objects.iter().zip(&bytes) {
        assert!(std::fs::read(object).is_ok_and(|found| found == *bytes), "{} was changed", object.display());
    }
    assert!(folders.iter().all(|folder| folder.is_dir() || folder.starts_with(root.join("tmp"))));

    // The datamover puts in what no repository has, and a link that leads out of it: the broker touches nothing outside.
    let outside = folder.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("file"), b"not ours").unwrap();
    std::fs::set_permissions(&outside, std::fs::Permissions::from_mode(0o700)).unwrap();
    attack("ln -s \"$1\" \"${1%/*}/repository/points/link\"; mkfifo \"${1%/*}/repository/index/pipe\"", &outside);
    let report = seal_folder(&root, DATAMOVER).unwrap();
    assert!(report.strange.contains(&"points/link".to_owned()) && report.strange.contains(&"index/pipe".to_owned()));
    let found = std::fs::metadata(&outside).unwrap();
    assert_eq!((found.mode() & 0o7777, found.gid()), (0o700, 0));
    std::fs::remove_file(root.join("points/link")).unwrap();
    std::fs::remove_file(root.join("index/pipe")).unwrap();

    // It can still write: here a tombstone, by the program itself.
    std::fs::write(folder.path().join("passphrase"), "correct horse battery staple").unwrap();
    let restore = programs::program("xenvault-restore").unwrap().get_program().to_owned();
    let script = format!(
        "\"{}\" verify --full --repository \"$1/repository\" --passphrase-file \"$1/passphrase\"",
        Path::new(&restore).display()
    );
    let written = shell(&script, folder.path()).output().unwrap();
    let said = String::from_utf8_lossy(&written.stdout).into_owned();
    assert!(said.contains("0 object(s) damaged"), "{written:?}");
    assert_eq!(seal_folder(&root, DATAMOVER).unwrap().sealed, 1, "the result of the verification was taken over too");

    // Whoever opens it finds the point, and root sweeps what was forgotten.
    let fresh = Repository::open_on(place.clone(), &passphrase()).await.unwrap();
    assert_eq!(fresh.points(&PointFilter::default()).await.unwrap().points.len(), 1);
    assert!(read(&fresh, &point).await == content);
    let mut options = VerifyOptions::default();
    (options.mode, options.write) = (VerifyMode::Full, false);
    assert!(fresh.verify(options).await.unwrap().is_clean());
    fresh.forget(&[point], "test").await.unwrap();
    let mut options = SweepOptions::default();
    (options.grace, options.confirm_many) = (std::time::Duration::ZERO, true);
    let ended = fresh.sweep(options).await.unwrap().ended.unwrap();
    assert_eq!((ended.removed_points, ended.removed_packs), (vec![point], after.packs));
    assert!(place.list("packs").await.unwrap().is_empty());
    // What is immutable keeps the folder from being removed with the test.
    for path in all(&root) {
        let _ = Command::new("chattr").arg("-i").arg(path).stderr(Stdio::null()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_broker_nothing_is_said_to_be_protected() {
    let folder = tempfile::tempdir().unwrap();
    let place: Arc<dyn Backend> = Arc::new(LocalFolder::new(folder.path()));
    let repository = init(place, "none").await.unwrap();
    let point = back_up(&repository, &noise(1, 100_000)).await.unwrap();
    let proof = repository.protection(&point).await.unwrap();
    assert!(!proof.holds() && proof.earliest.is_none() && proof.promised_until.is_none());
    assert!(repository.keep(xenvault_store::KeepOptions::default()).await.is_err());
    let locked = init(Arc::new(LocalFolder::new(folder.path().join("b"))), "object-lock:compliance:30").await;
    assert!(matches!(locked, Err(xenvault_store::StoreError::LockNotKept { .. })));
}
