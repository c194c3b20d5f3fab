//! `init-repository`: an empty repository in a new or empty folder, or in a folder of a bucket.

use crate::Outcome;
use crate::arguments::InitArguments;
use crate::shell::bucket::meet;
use crate::shell::output::Format;
use crate::shell::repository::OpenError;
use serde_json::json;
use xenvault_store::{Immutability, InitOptions, Repository};

pub async fn run(init: &InitArguments, format: Format) -> Outcome {
    let arguments = &init.repository;
    let passphrase = arguments.passphrase()?;
    let path = &arguments.repository;
    let mut options = InitOptions::default();
    options.immutability = init.immutability;
    let made = match arguments.place().map_err(OpenError::from)? {
        None => Repository::init(path, &passphrase, options).await,
        Some(place) => match meet(&place).await {
            Ok(place) => Repository::init_on(place, &passphrase, options).await,
            Err(error) => Err(error),
        },
    };
    let repository = made.map_err(|source| arguments.failed(source))?;
    let (id, place) = (repository.id(), repository.place());
    let mut text = format!("made repository {id} in {}\n", path.display());
    if place.service.is_some() {
        let word = |is_so| if is_so { "yes" } else { "no" };
        text.push_str(&format!(
            "Found out by trying: keeps conditions on writes: {}; keeps old versions: {}\n",
            word(place.conditional_put),
            word(place.versioned),
        ));
    }
    text.push_str(&format!("immutability: {}\n", repository.immutability()));
    if repository.immutability() == Immutability::Broker {
        text.push_str(
            "Let `xenvault-restore seal` run as root from now on: nothing is protected before it was sealed.\n",
        );
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
        "immutability": repository.immutability().to_string(),
    });
    Ok(format.result(&text, json))
}
