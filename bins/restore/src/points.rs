//! Finds the point that an operator means: by its id or by enough of its beginning.

use xenvault_store::{PointFilter, PointId, PointSummary, Repository, StoreError};

/// Why there is no single point.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChooseError {
    /// None begins so.
    #[error("no restore point of this repository begins with {text:?}: `xenvault-restore points` lists them")]
    Unknown {
        /// As given.
        text: String,
    },
    /// Several begin so.
    #[error("{count} restore points begin with {text:?}: give more of the id")]
    Ambiguous {
        /// As given.
        text: String,
        /// How many.
        count: usize,
    },
    /// The points can not be listed.
    #[error("the restore points can not be listed")]
    List(#[source] StoreError),
}

/// The point whose id begins with `text`.
///
/// # Errors
/// [`ChooseError`].
pub async fn choose(repository: &Repository, text: &str) -> Result<PointId, ChooseError> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    let listing = repository.points(&PointFilter::default()).await.map_err(ChooseError::List)?;
    pick(listing.points.iter().map(|point| point.id), text)
}

fn pick(ids: impl Iterator<Item = PointId>, text: &str) -> Result<PointId, ChooseError> {
    let wanted = text.to_ascii_lowercase();
    let mut fitting = ids.filter(|id| !wanted.is_empty() && id.to_string().starts_with(&wanted));
    match (fitting.next(), fitting.count()) {
        (Some(id), 0) => Ok(id),
        (Some(_), more) => Err(ChooseError::Ambiguous { text: text.to_owned(), count: more + 1 }),
        (None, _) => Err(ChooseError::Unknown { text: text.to_owned() }),
    }
}

/// Whether a point is of the VM with this UUID or name.
pub fn is_of(point: &PointSummary, vm: &str) -> bool {
    point.vm_uuid.eq_ignore_ascii_case(vm) || point.vm_name == vm
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_an_id_is_enough_if_no_other_has_it() {
        let ids: Vec<PointId> = (0..50).map(|_| PointId::random()).collect();
        let first = ids.first().unwrap().to_string();
        assert_eq!(pick(ids.iter().copied(), &first.to_uppercase()).unwrap().to_string(), first);
        assert!(matches!(pick(ids.iter().copied(), ""), Err(ChooseError::Unknown { .. })));
        let crowded = (0..16)
            .map(|digit| format!("{digit:x}"))
            .find(|digit| ids.iter().filter(|id| id.to_string().starts_with(digit)).count() > 1);
        assert!(matches!(pick(ids.iter().copied(), &crowded.unwrap()), Err(ChooseError::Ambiguous { .. })));
    }
}
