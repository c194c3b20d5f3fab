//! Finds the point that an operator means: by its id or by enough of its beginning.

use crate::Failure;
use crate::shell::exit::{Exit, Refusal};
use xenvault_store::{PointFilter, PointId, PointSummary, Repository};

/// The point whose id begins with `text`.
///
/// # Errors
/// [`Refusal`] if there is none or more than one; [`StoreError`](xenvault_store::StoreError) if the points can not be
/// listed.
pub async fn choose(repository: &Repository, text: &str) -> Result<PointId, Failure> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    let listing = repository.points(&PointFilter::default()).await?;
    let all = listing.points.iter().chain(&listing.forgotten).chain(&listing.quarantined);
    Ok(pick(all.map(|point| point.id), text)?)
}

fn pick(ids: impl Iterator<Item = PointId>, text: &str) -> Result<PointId, Refusal> {
    let wanted = text.to_ascii_lowercase();
    let mut fitting = ids.filter(|id| !wanted.is_empty() && id.to_string().starts_with(&wanted));
    let text = match (fitting.next(), fitting.count()) {
        (Some(id), 0) => return Ok(id),
        (Some(_), more) => format!("{} restore points begin with {text:?}: give more of the id", more + 1),
        (None, _) => {
            format!("no restore point of this repository begins with {text:?}: `xenvault-restore points` lists them")
        }
    };
    Err(Refusal { exit: Exit::NotFound, text })
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
        assert!(pick(ids.iter().copied(), "").unwrap_err().text.starts_with("no restore point"));
        let crowded = (0..16)
            .map(|digit| format!("{digit:x}"))
            .find(|digit| ids.iter().filter(|id| id.to_string().starts_with(digit)).count() > 1);
        assert!(pick(ids.iter().copied(), &crowded.unwrap()).unwrap_err().text.contains("give more"));
    }
}
