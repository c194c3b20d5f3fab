//! `init-repository`: an empty repository in a new or empty folder, or in a folder of a bucket.

use crate::Outcome;
use crate::shell::bucket::greet;
use crate::shell::output::Format;
use crate::shell::repository::{OpenError, RepositoryArguments};
use serde_json::json;
use std::sync::Arc;
use xenvault_store::{InitOptions, Repository};

pub async fn run(arguments: &RepositoryArguments, format: Format) -> Outcome {
    let passphrase = arguments.passphrase()?;
    let path = &arguments.repository;
    let options = InitOptions::default();
    let made = match arguments.place().map_err(OpenError::from)? {
        None => Repository::init(path, &passphrase, options).await,
        Some(place) => match greet(&place).await {
            Ok(()) => Repository::init_on(Arc::new(place), &passphrase, options).await,
            Err(error) => Err(error),
        },
    };
    let repository = made.map_err(|source| arguments.failed(source))?;
    let (id, place) = (repository.id(), repository.place());
    let mut text = format!("made repository {id} in {}\n", path.display());
    if place.service.is_some() {
        let word = |is_so| if is_so { "yes" } else { "no" };
        text.push_str(&format!(
            "Found out by trying: keeps conditions on writes: {}; keeps old versions: {}; protects objects: {}\n",
            word(place.conditional_put),
            word(place.versioned),
            place.immutability,
        ));
    }
    text.push_str(
        "Keep the passphrase somewhere else too: without it, or a recovery key (`xenvault-restore key recovery`), nobody \
         can read the backups.",
    );
    let json = json!({
        "repository": id.to_string(),
        "path": path,
        "conditional_put": place.conditional_put,
        "versioned": place.versioned,
        "immutability": place.immutability,
    });
    Ok(format.result(&text, json))
}
