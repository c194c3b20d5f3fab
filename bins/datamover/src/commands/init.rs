//! `init-repository`: an empty repository in a new or empty folder.

use crate::Outcome;
use crate::shell::output::Format;
use crate::shell::repository::{OpenError, RepositoryArguments};
use serde_json::json;
use xenvault_store::{InitOptions, Repository};

pub async fn run(arguments: &RepositoryArguments, format: Format) -> Outcome {
    let passphrase = arguments.passphrase()?;
    let path = &arguments.repository;
    let repository = Repository::init(path, &passphrase, InitOptions::default())
        .await
        .map_err(|source| OpenError::Open { path: path.clone(), source })?;
    let id = repository.id();
    let text = format!(
        "made repository {id} in {}\nKeep the passphrase somewhere else too: without it, or a recovery key (`xenvault-restore key recovery`), nobody can read the backups.",
        path.display()
    );
    Ok(format.result(&text, json!({ "repository": id.to_string(), "path": path })))
}
