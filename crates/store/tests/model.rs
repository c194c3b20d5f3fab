//! Any sequence of fulls and incrementals equals plain arrays of bytes, and equal content has equal maps.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests fail the test")]

mod common;

use bytes::Bytes;
use common::{BLOCK, back_up, local, manifest, new_repository, noise, read_disk, write_disk, writer};
use futures::TryStreamExt as _;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use xenvault_block::{ByteRange, ExtentSet};
use xenvault_store::{DiskMapRef, DiskOptions, Repository};

/// One thing that happens to a disk.
#[derive(Clone, Debug)]
enum Change {
    Write { gap: u64, pieces: Vec<u64>, length: u64 },
    Zero { gap: u64, length: u64 },
}

#[derive(Clone, Debug)]
struct Step {
    grow: u64,
    aligned: bool,
    changes: Vec<Change>,
}

fn change() -> impl Strategy<Value = Change> {
    let gap = prop_oneof![Just(0_u64), 0_u64..9000, 0_u64..(3 << 20), 0_u64..(20 << 20)];
    let length = prop_oneof![1_u64..9000, 1_u64..(300 << 10), 1_u64..(2 << 20)];
    prop_oneof![
        3 => (gap.clone(), proptest::collection::vec(0_u64..6, 1..4), length.clone())
            .prop_map(|(gap, pieces, length)| Change::Write { gap, pieces, length }),
        1 => (gap, length).prop_map(|(gap, length)| Change::Zero { gap, length }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let grow = prop_oneof![3 => Just(0_u64), 1 => 1_u64..(3 << 20), 1 => Just(17 << 20)];
    (grow, any::<bool>(), proptest::collection::vec(change(), 0..8)).prop_map(|(grow, aligned, changes)| Step {
        grow,
        aligned,
        changes,
    })
}

/// The bytes of one write: a few seeds, so that content repeats within and between disks, and some zero blocks.
fn content(pieces: &[u64], length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < length {
        for &seed in pieces {
            let piece = 1 + usize::try_from(seed).unwrap() * 7;
            bytes.extend(if seed == 0 { vec![0; 3 * BLOCK] } else { noise(seed, piece * BLOCK) });
        }
    }
    bytes.truncate(length);
    bytes
}

async fn apply(
    repository: &Repository,
    model: &mut Vec<u8>,
    base: Option<DiskMapRef>,
    step: &Step,
) -> Result<DiskMapRef, TestCaseError> {
    model.resize(model.len() + usize::try_from(step.grow).unwrap(), 0);
    let size = model.len() as u64;
    let writer = writer(repository).await;
    let mut disk = writer.disk(DiskOptions { virtual_size: size, base }).await.unwrap();
    let mut at = 0_u64;
    for change in &step.changes {
        let unit = if step.aligned { BLOCK as u64 } else { 1 };
        let (gap, length) = match change {
            Change::Write { gap, length, .. } | Change::Zero { gap, length } => (*gap, *length),
        };
        let start = (at + gap).next_multiple_of(unit).min(size);
        let end = (start + length).next_multiple_of(unit).min(size);
        let range = usize::try_from(start).unwrap()..usize::try_from(end).unwrap();
        match change {
            Change::Write { pieces, .. } => {
                let bytes = content(pieces, range.len());
                model[range].copy_from_slice(&bytes);
                disk.write(start, Bytes::from(bytes)).await.unwrap();
            }
            Change::Zero { .. } => {
                model[range].fill(0);
                disk.zero(ByteRange::new(start, end).unwrap()).await.unwrap();
            }
        }
        at = end;
    }
    let result = disk.finish().await.unwrap();
    let whole = write_disk(&writer, model).await;
    let config = writer.put_blob(b"{}").await.unwrap();
    writer.publish(manifest(&[result.map], config)).await.unwrap();
    prop_assert_eq!(result.map, whole.map, "an incremental cuts as a full does");
    Ok(result.map)
}

async fn compare(repository: &Repository, map: &DiskMapRef, model: &[u8]) -> Result<(), TestCaseError> {
    prop_assert!(read_disk(repository, map).await == model, "content differs");
    let reader = repository.disk(map);
    let all = ByteRange::up_to(map.virtual_size);
    let mut streamed = vec![0; model.len()];
    let mut covered = ExtentSet::new();
    let mut stream = reader.stream(all, Default::default());
    while let Some((offset, bytes)) = stream.try_next().await.unwrap() {
        let at = usize::try_from(offset).unwrap();
        streamed[at..at + bytes.len()].copy_from_slice(&bytes);
        covered.insert(ByteRange::with_length(offset, bytes.len() as u64).unwrap());
    }
    prop_assert!(streamed == model, "streamed content differs");
    let expected: ExtentSet = (0_u64..)
        .zip(model.chunks(BLOCK))
        .filter(|(_, block)| block.iter().any(|&byte| byte != 0))
        .map(|(number, block)| ByteRange::with_length(number * BLOCK as u64, block.len() as u64).unwrap())
        .collect();
    prop_assert_eq!(&reader.extents(all).await.unwrap(), &expected);
    prop_assert_eq!(covered, expected);
    Ok(())
}

#[test]
fn any_sequence_of_backups_equals_plain_copies() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let folder = common::tempdir();
    let first = runtime.block_on(new_repository(folder.path()));
    let case = (0_u64..(40 << 20), proptest::collection::vec(step(), 1..5));
    let mut runner = TestRunner::new(Config { cases: 24, ..Config::default() });
    let result = runner.run(&case, |(size, steps)| {
        runtime.block_on(async {
            let mut history = Vec::new();
            let mut model = vec![0; usize::try_from(size).unwrap()];
            let mut base = None;
            let repository = first.reopen_on(local(folder.path())).unwrap();
            for step in &steps {
                base = Some(apply(&repository, &mut model, base, step).await?);
                history.push((base.unwrap(), model.clone()));
            }
            // Every point stays what it was, also for somebody who has only just opened the repository.
            let repository = first.reopen_on(local(folder.path())).unwrap();
            for (map, model) in &history {
                compare(&repository, map, model).await?;
            }
            Ok(())
        })
    });
    result.unwrap();
}

#[tokio::test]
async fn a_point_comes_back_after_reopening() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let content = noise(1, (5 << 20) + 512);
    let (id, map) = back_up(&repository, &content).await;
    drop(repository);

    let repository = common::open(folder.path()).await.unwrap();
    let listing = repository.points(&Default::default()).await.unwrap();
    assert_eq!(listing.points.len(), 1);
    assert!(listing.damaged.is_empty());
    let point = repository.point(&id).await.unwrap();
    assert_eq!(point.disks[0].map, map);
    assert_eq!(repository.blob(&point.vm_config).await.unwrap(), b"{}");
    assert!(read_disk(&repository, &map).await == content);
}
