//! The embedding example of the README, to the letter.

use std::error::Error;
use std::path::Path;
use std::time::Duration;
use xenvault_engine::{BackupRequest, Engine, EngineOptions, RestoreRequest, SrSelector, VmSelector};
use xenvault_store::{ByteRange, InitOptions, Repository, Secret};
use xenvault_xenapi::{ConnectOptions, Session, Trust};

/// A pool and where its backups go.
pub struct Place<'a> {
    pub url: &'a str,
    pub fingerprint: &'a str,
    pub password: &'a str,
    pub folder: &'a Path,
}

/// Logs in, and makes a repository with one passphrase.
pub async fn open(place: &Place<'_>) -> Result<(Session, Repository, Engine), Box<dyn Error>> {
    let trust = Trust::Fingerprint(place.fingerprint.parse()?);
    let session = Session::login(ConnectOptions::new(place.url, "root", place.password, trust)).await?;
    let passphrase = Secret::new("a long passphrase");
    let repository = Repository::init(&place.folder.join("repository"), &passphrase, InitOptions::default()).await?;
    let options = EngineOptions::new(place.folder.join("state"));
    let engine = Engine::open(session.clone(), Some(repository.clone()), options)?;
    Ok((session, repository, engine))
}

/// Backs a VM up, reads the first MiB of its first disk out of the point, and restores it under another name.
/// Gives that MiB and the UUID of the new VM.
pub async fn backup_read_restore(
    engine: &Engine,
    repository: &Repository,
    vm: &str,
) -> Result<(Vec<u8>, String), Box<dyn Error>> {
    let backup = engine.backup(BackupRequest::incremental(VmSelector::Name(vm.to_owned()))).await?;

    let point = repository.point(&backup.point).await?;
    let disk = point.disks.first().ok_or("the VM has no disk")?;
    let start = repository.disk(&disk.map).read_at(ByteRange::up_to(1 << 20)).await?;

    let mut restore = RestoreRequest::new(backup.point, SrSelector::Default);
    restore.name = Some(format!("{vm} restored"));
    let restored = engine.restore(restore).await?;
    Ok((start.to_vec(), restored.vm_uuid))
}

/// Dropping the future of a workflow cancels it, and what it made in the pool is removed.
pub async fn give_up_after(engine: &Engine, vm: &str, patience: Duration) -> bool {
    let backup = engine.backup(BackupRequest::full(VmSelector::Name(vm.to_owned())));
    let ended = tokio::time::timeout(patience, backup).await;
    engine.settled().await;
    ended.is_ok()
}
