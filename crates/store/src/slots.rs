//! Key slots of a repository: which there are, a new one, one less, one in place of another.
//!
//! No data is written again for any of this. A slot is written under a random name of its own and read back, as somebody
//! who opens the repository would, before anything else happens; the slot that opened the repository is the last to go,
//! so that at least one is there that is known to open, wherever a process dies. The keys themselves stay the same:
//! whoever has a copy of a slot that was removed, and its secret, can still open what is there.

use std::sync::Arc;

use bytes::Bytes;
use xenvault_store_format::{
    FormatError, KdfParams, KeyAccess, KeyMaterial, KeySlot, Keys, RecoveryKey, RepositoryId, Secret, SlotHead,
    SlotKind, SlotSecret,
};

use crate::backend::{Backend, get};
use crate::repository::Inner;
use crate::{Repository, StoreError, names, records};

const MAX_KEY_BYTES: usize = 4 * 1024;

/// Most key slots of a repository: whoever opens it may have to try them all.
pub const MAX_KEY_SLOTS: usize = 64;

/// The slot that opened a repository.
#[derive(Clone, Debug)]
pub(crate) struct OpenedSlot {
    /// Name of its object.
    pub(crate) name: String,
    pub(crate) slot: KeySlot,
}

/// What a listing shows of a key slot.
#[derive(Debug)]
pub struct KeySlotListing {
    /// Its name, by which it can be removed.
    pub name: String,
    /// What is in it, or why that can not be told.
    pub slot: Result<KeySlotSummary, StoreError>,
    /// Whether the repository was opened with it.
    pub in_use: bool,
}

/// What everybody may know of a key slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySlotSummary {
    /// What opens it.
    pub kind: SlotKind,
    /// What it gives.
    pub access: KeyAccess,
    /// When it was made, in milliseconds since 1970-01-01 UTC, by the clock of whoever made it.
    pub created_unix_ms: u64,
    /// Whose it is, for people.
    pub label: String,
}

/// What a new key slot opens with.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum NewKey {
    /// A passphrase, and the cost of trying one.
    Passphrase(Secret, KdfParams),
    /// A recovery key, which is to be kept where it is found when the passphrase is lost.
    Recovery(RecoveryKey),
}

impl NewKey {
    fn secret(&self) -> Result<SlotSecret, StoreError> {
        let misuse = |what: &str| Err(StoreError::Misuse { what: what.to_owned() });
        match self {
            Self::Passphrase(secret, _) if RecoveryKey::is_meant_by(secret) => {
                misuse("a passphrase can not begin with XVRK, as recovery keys do: choose another one")
            }
            Self::Passphrase(secret, _) if secret.expose().is_empty() => misuse("a passphrase can not be empty"),
            Self::Passphrase(secret, _) => Ok(SlotSecret::Passphrase(secret.clone())),
            Self::Recovery(key) => Ok(SlotSecret::Recovery(key.clone())),
        }
    }

    fn cost(&self) -> KdfParams {
        match self {
            Self::Passphrase(_, cost) => *cost,
            Self::Recovery(_) => KdfParams::default(),
        }
    }
}

impl Repository {
    /// What the key allows that the repository was opened with.
    pub fn access(&self) -> KeyAccess {
        self.inner.keys.access()
    }

    /// All key slots, damaged ones too, in the order of their names.
    ///
    /// # Errors
    /// [`StoreError::Backend`] if they can not be listed.
    pub async fn key_slots(&self) -> Result<Vec<KeySlotListing>, StoreError> {
        let repository = &self.inner;
        let mut listing = Vec::new();
        for name in records::list(repository, names::KEYS).await? {
            let slot = read(&*repository.backend, &name, repository.keys.repository()).await;
            // Somebody else has removed it.
            if slot.as_ref().is_err_and(StoreError::is_gone) {
                continue;
            }
            let slot = slot.map(|slot| KeySlotSummary::of(slot.head()));
            let in_use = name == repository.slot.name;
            listing.push(KeySlotListing { name: short(&name).to_owned(), slot, in_use });
        }
        Ok(listing)
    }

    /// Adds a key slot and gives its name. When it returns, the slot is durable and was opened with the new secret.
    ///
    /// Any number of these may run at the same time; none replaces what another one writes.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] if secret or label can not be used, or there are [`MAX_KEY_SLOTS`];
    /// [`StoreError::WriteOnly`] if the repository was opened with a key that only writes; [`StoreError::Full`] and
    /// [`StoreError::Backend`]: the slot may be there all the same then, as [`Self::key_slots`] tells.
    pub async fn add_key(&self, key: &NewKey, access: KeyAccess, label: &str) -> Result<String, StoreError> {
        Ok(short(&self.write_slot(key, access, label).await?).to_owned())
    }

    /// Puts a new secret in the place of the one that the repository was opened with: the new slot is written and
    /// opened before the old one goes. Gives the name of the new slot; `key_slots` of this repository go on telling that
    /// the old one is in use, so open it anew.
    ///
    /// # Errors
    /// As [`Self::add_key`]. If the old slot can not be removed, both open the repository;
    /// [`StoreError::KeySlotLocked`] says that the store keeps it for a while.
    pub async fn change_key(&self, key: &NewKey) -> Result<String, StoreError> {
        let OpenedSlot { name: old, slot } = &*self.inner.slot;
        let new = self.write_slot(key, slot.head().access, &slot.head().label).await?;
        remove(&self.inner, old).await?;
        // Somebody may have removed the new one meanwhile, relying on the old one.
        let repository = self.inner.keys.repository();
        match read(&*self.inner.backend, &new, repository).await {
            Err(error) if error.is_gone() => self.put_back().await?,
            other => drop(other?),
        }
        Ok(short(&new).to_owned())
    }

    /// Removes key slots, damaged ones too. The slot that opened the repository can not be removed: so one stays that is
    /// known to open. Gives how many were there.
    ///
    /// Where the store keeps versions or locks objects, what was removed can be had back from there until its retention
    /// ends. Keys do not change: whoever has a copy of the slot, and its secret, can use it as before.
    ///
    /// # Errors
    /// [`StoreError::KeySlotInUse`] and [`StoreError::UnknownKeySlot`], before anything is removed;
    /// [`StoreError::WriteOnly`]; [`StoreError::KeySlotLocked`], [`StoreError::Backend`]: some may be removed then.
    pub async fn remove_keys(&self, slots: &[String]) -> Result<usize, StoreError> {
        self.full("remove key slots")?;
        let repository = &self.inner;
        let listed = records::list(repository, names::KEYS).await?;
        let mut going = Vec::new();
        for slot in slots {
            let name = names::key(slot);
            if name == repository.slot.name {
                return Err(StoreError::KeySlotInUse { name: slot.clone() });
            }
            if !listed.contains(&name) {
                return Err(StoreError::UnknownKeySlot { name: slot.clone() });
            }
            going.push(name);
        }
        going.sort_unstable();
        going.dedup();
        // What stays must be there as it was when it opened.
        self.own_slot().await?;
        for name in &going {
            remove(repository, name).await?;
        }
        // Somebody else may have removed ours, relying on one of these.
        match self.own_slot().await {
            Err(error) if error.is_gone() => self.put_back().await?,
            other => other?,
        }
        Ok(going.len())
    }

    /// Refuses what a key that only writes can not do.
    pub(crate) fn full(&self, action: &'static str) -> Result<(), StoreError> {
        match self.access() {
            KeyAccess::Full => Ok(()),
            _ => Err(StoreError::WriteOnly { action }),
        }
    }

    async fn own_slot(&self) -> Result<(), StoreError> {
        let repository = &self.inner;
        let found = read(&*repository.backend, &repository.slot.name, repository.keys.repository()).await?;
        if found == repository.slot.slot {
            return Ok(());
        }
        let source = "it is not the slot any more that the repository was opened with".into();
        Err(StoreError::Damaged { object: repository.slot.name.clone(), source })
    }

    async fn put_back(&self) -> Result<(), StoreError> {
        let OpenedSlot { name, slot } = &*self.inner.slot;
        put_slot(&self.inner, name, slot).await.map(drop)
    }

    /// Name of the new slot's object.
    async fn write_slot(&self, key: &NewKey, access: KeyAccess, label: &str) -> Result<String, StoreError> {
        self.full("add key slots")?;
        let repository = &self.inner;
        let count = records::list(repository, names::KEYS).await?.len();
        if count >= MAX_KEY_SLOTS {
            let what = format!("there are {count} key slots, the limit is {MAX_KEY_SLOTS}: remove one first");
            return Err(StoreError::Misuse { what });
        }
        let material = match access {
            KeyAccess::WriteOnly => KeyMaterial::Writer(repository.keys.writer_key()),
            _ => repository.keys.material(),
        };
        let (secret, cost, id) = (key.secret()?, key.cost(), repository.keys.repository());
        let (label, now) = (label.to_owned(), records::unix_ms());
        let (wrapped, with) = (material.clone(), secret.clone());
        let slot = deriving(move || KeySlot::wrap(&wrapped, id, &with, cost, &label, now)).await;
        let slot = slot.map_err(|error| StoreError::Misuse { what: error.to_string() })?;
        let mut name = names::new_key();
        // Names are random; whoever has this one all the same keeps it.
        while !put_slot(repository, &name, &slot).await? {
            name = names::new_key();
        }
        let found = read(&*repository.backend, &name, id).await?;
        let opened = opening(move || found.unwrap(&secret)).await?;
        if opened.as_ref() == Some(&material) {
            return Ok(name);
        }
        let source = "it was written just now, and does not open with its secret".into();
        Err(StoreError::Damaged { object: name, source })
    }
}

/// Writes a slot under a name; `false` if another one has that name.
async fn put_slot(repository: &Inner, name: &str, slot: &KeySlot) -> Result<bool, StoreError> {
    match repository.backend.put_new(name, Bytes::from(slot.encode())).await {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(StoreError::io("write", name, error)),
    }
    // Not every store keeps to "only if it is not there yet", so what is there decides.
    Ok(read(&*repository.backend, name, repository.keys.repository()).await? == *slot)
}

async fn remove(repository: &Inner, name: &str) -> Result<(), StoreError> {
    match repository.backend.remove(name).await {
        Err(source) if source.kind() == std::io::ErrorKind::ResourceBusy => {
            Err(StoreError::KeySlotLocked { name: short(name).to_owned(), source })
        }
        removed => removed.map_err(|error| StoreError::io("remove", name, error)),
    }
}

impl KeySlotSummary {
    fn of(head: &SlotHead) -> Self {
        let SlotHead { kind, access, created_unix_ms, label, .. } = head.clone();
        Self { kind, access, created_unix_ms, label }
    }
}

fn short(name: &str) -> &str {
    names::last_segment(name, names::KEYS).unwrap_or(name)
}

async fn read(backend: &dyn Backend, name: &str, repository: RepositoryId) -> Result<KeySlot, StoreError> {
    let bytes = get(backend, name, MAX_KEY_BYTES).await.map_err(|error| StoreError::io("read", name, error))?;
    let slot = KeySlot::decode(&bytes).map_err(|error| StoreError::format(name, error))?;
    if slot.repository() != repository {
        return Err(StoreError::format(name, FormatError::ForeignRepository { what: "key slot" }));
    }
    Ok(slot)
}

/// Finds the slot that the secret opens.
pub(crate) async fn unlock(
    backend: &dyn Backend,
    repository: RepositoryId,
    secret: &Secret,
) -> Result<(Keys, OpenedSlot), StoreError> {
    let secret = SlotSecret::new(secret).map_err(|source| StoreError::RecoveryKey { source })?;
    let names = backend.list(names::KEYS).await.map_err(|error| StoreError::io("list", names::KEYS, error))?;
    let mut damaged: Vec<(String, StoreError)> = Vec::new();
    let mut intact = 0;
    for name in names {
        let slot = match read(backend, &name, repository).await {
            Ok(slot) => slot,
            Err(error) if error.is_gone() => continue,
            Err(error) => {
                tracing::warn!(slot = %name, error = %error, "this key slot can not be used");
                damaged.push((name, error));
                continue;
            }
        };
        intact += 1;
        let (tried, with) = (slot.clone(), secret.clone());
        if let Some(material) = opening(move || tried.unwrap(&with)).await? {
            let keys = Keys::of_material(material, repository).map_err(|error| StoreError::format(&name, error))?;
            return Ok((keys, OpenedSlot { name, slot }));
        }
    }
    match damaged.pop() {
        // With intact slots only, the secret is what the operator should look at.
        None if intact > 0 => Err(StoreError::WrongPassphrase),
        None => {
            let source = "there is no key slot, so nothing in this repository can be opened".into();
            Err(StoreError::Damaged { object: names::KEYS.to_owned(), source })
        }
        Some((_, error)) if intact == 0 => Err(error),
        Some((last, source)) => {
            let mut slots: Vec<String> = damaged.into_iter().map(|(name, _)| name).collect();
            slots.push(last);
            Err(StoreError::NoSlotOpens { slots: slots.join(", "), source: Box::new(source) })
        }
    }
}

/// The first slot of a new repository.
pub(crate) async fn first_slot(keys: &Keys, secret: &Secret, kdf: KdfParams) -> Result<OpenedSlot, StoreError> {
    let key = NewKey::Passphrase(secret.clone(), kdf);
    let (material, id, secret, now) = (keys.material(), keys.repository(), key.secret()?, records::unix_ms());
    let slot = opening(move || KeySlot::wrap(&material, id, &secret, kdf, "", now)).await?;
    Ok(OpenedSlot { name: names::FIRST_KEY.to_owned(), slot })
}

async fn opening<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FormatError> + Send + 'static,
) -> Result<T, StoreError> {
    deriving(work).await.map_err(|error| StoreError::format(names::KEYS, error))
}

/// Runs what takes tenths of a second and much memory, off the async threads.
async fn deriving<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FormatError> + Send + 'static,
) -> Result<T, FormatError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(FormatError::Cryptography))
}

/// What an open repository keeps of the way it was opened.
pub(crate) type SharedSlot = Arc<OpenedSlot>;
