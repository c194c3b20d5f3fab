//! New chunks share frames: what that saves, and that nobody waits for a frame that nobody ends.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests fail the test")]

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::{back_up, local, manifest, new_repository, noise, objects, read_disk, write_disk, writer};
use futures::StreamExt as _;
use xenvault_block::ByteRange;
use xenvault_store::{DiskOptions, SweepOptions, VerifyMode, VerifyOptions, WriterOptions};

/// A text of words that are all known after 32 KiB of it: a chunk has hardly met them when it ends.
fn text() -> Vec<u8> {
    let (words, order) = (noise(1, 2048 * 16), noise(2, 2 * (4 << 20) / 16));
    let number = |pair: &[u8]| usize::from(u16::from_le_bytes([pair[0], pair[1]]) % 2048);
    order.chunks_exact(2).flat_map(|pair| words[number(pair) * 16..][..16].to_vec()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_chunks_near_each_other_have_in_common_is_stored_once() {
    let content = text();
    let mut stored = Vec::new();
    for frame_bytes in [0, WriterOptions::default().frame_bytes] {
        let folder = common::tempdir();
        let repository = new_repository(folder.path()).await;
        let options = WriterOptions { frame_bytes, ..Default::default() };
        let run = repository.writer(options).await.unwrap();
        let counters = run.counters();
        let map = write_disk(&run, &content).await.map;
        let config = run.put_blob(b"{}").await.unwrap();
        run.publish(manifest(&[map], config)).await.unwrap();
        stored.push(counters.progress().stored_bytes);
        assert!(read_disk(&repository, &map).await == content);
        // Whatever the frames are, chunks are the same.
        let again = write_disk(&writer(&repository).await, &content).await;
        assert_eq!((again.map, again.stats.new_bytes), (map, 0));
    }
    assert!(stored[1] < stored[0] * 7 / 10, "{stored:?} of {}", content.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_that_stand_still_do_not_hold_up_others() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let run = repository.writer(WriterOptions { memory_bytes: 4 << 20, ..Default::default() }).await.unwrap();
    let size = 400_000;
    let work = async {
        let mut open = Vec::new();
        for number in 0..64 {
            let mut disk = run.disk(DiskOptions { virtual_size: size, base: None }).await.unwrap();
            disk.write(0, Bytes::from(noise(number, 300_000))).await.unwrap();
            open.push(disk);
        }
        // A flush ends frames of disks that are not finished, and those may go on during it.
        run.flush().await.unwrap();
        let (flushed, ()) = tokio::join!(run.flush(), async {
            for (number, disk) in (100..).zip(&mut open) {
                disk.write(300_000, Bytes::from(noise(number, 100_000))).await.unwrap();
            }
        });
        flushed.unwrap();
        let mut maps = Vec::new();
        for disk in open {
            maps.push(disk.finish().await.unwrap().map);
        }
        maps
    };
    let maps = tokio::time::timeout(Duration::from_secs(300), work).await.unwrap();
    let config = run.put_blob(b"{}").await.unwrap();
    run.publish(manifest(&maps, config)).await.unwrap();
    for (number, map) in (0..).zip(&maps) {
        let expected = [noise(number, 300_000), noise(100 + number, 100_000)].concat();
        assert!(read_disk(&repository, map).await == expected, "{number}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_counts_a_frame_once_and_its_chunks_by_their_share() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let content = noise(7, 4 << 20);
    let (going, _) = back_up(&repository, &content).await;
    // A quarter of the content stays: of every megabyte, and so of most frames, a part.
    let second: Vec<u8> = content.chunks(256 << 10).step_by(4).flatten().copied().collect();
    let (_, map) = back_up(&repository, &second).await;
    let length = |path: &std::path::PathBuf| common::fs::length(path).unwrap();
    let first_pack = objects(folder.path(), "packs").iter().map(length).max().unwrap();
    repository.forget(&[going], "expired").await.unwrap();
    let mut options = SweepOptions::default();
    (options.grace, options.confirm_many) = (Duration::ZERO, true);
    let report = repository.sweep(options).await.unwrap();
    let (begun, ended) = (report.begun.unwrap(), report.ended.unwrap());
    assert!(begun.bytes <= first_pack && begun.bytes > first_pack - 20_000, "{begun:?} of {first_pack}");
    // That of content, and that of the pages of maps.
    assert_eq!((ended.removed_packs, ended.removed_bytes), (2, begun.bytes));
    let expected = second.len() as u64;
    assert!((expected / 2..expected * 5 / 4).contains(&begun.carry_bytes), "{begun:?} of {expected}");
    assert!((expected / 2..expected * 5 / 4).contains(&ended.carried_bytes), "{ended:?} of {expected}");
    assert!(read_disk(&repository, &map).await == second);
    // What was carried shares frames again.
    let fresh = repository.reopen_on(local(folder.path())).unwrap();
    assert!(read_disk(&fresh, &map).await == second);
    assert!(objects(folder.path(), "packs").iter().map(length).sum::<u64>() < expected + 50_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_frame_hurts_each_of_its_chunks_and_no_other() {
    let folder = common::tempdir();
    let repository = new_repository(folder.path()).await;
    let content = noise(8, 2 << 20);
    let (_, map) = back_up(&repository, &content).await;
    // That of content is the larger one.
    let pack =
        objects(folder.path(), "packs").into_iter().max_by_key(|path| common::fs::length(path).unwrap()).unwrap();
    let sound = common::fs::read(&pack).unwrap();
    let mut hurt = sound.clone();
    hurt[1 << 20] ^= 1;
    common::fs::write(&pack, hurt).unwrap();
    let fresh = || repository.reopen_on(local(folder.path())).unwrap();
    let chunks = fresh().disk(&map).chunks(ByteRange::up_to(map.virtual_size)).await.unwrap();
    let mut unreadable = Vec::new();
    let mut starts = chunks.iter().map(|(start, _)| *start).chain([map.virtual_size]).peekable();
    let reader = fresh().disk(&map);
    while let (Some(start), Some(end)) = (starts.next(), starts.peek()) {
        let range = ByteRange::new(start, *end).unwrap();
        if reader.read_at(range).await.is_err() {
            unreadable.push(range);
        }
    }
    assert!(unreadable.len() > 2 && unreadable.len() < 40, "{unreadable:?}");
    let mut options = VerifyOptions::default();
    options.mode = VerifyMode::Full;
    let report = fresh().verify(options).await.unwrap();
    assert_eq!((report.damage.len(), report.marked_copies), (1, unreadable.len() as u64), "{report:?}");
    let disk = &report.hurt[0].disks[0];
    assert_eq!(disk.bytes, unreadable.iter().map(|range| range.len()).sum::<u64>());
    // The next backup stores what is marked, and nothing else.
    let run = writer(&fresh()).await;
    let again = write_disk(&run, &content).await;
    assert_eq!((again.map, again.stats.new_bytes), (map, disk.bytes));
}

#[tokio::test]
async fn readers_that_take_turns_in_one_task_do_not_wait_for_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let repository = new_repository(folder.path()).await;
    let content = noise(9, 6 << 20);
    let (_, map) = back_up(&repository, &content).await;
    let disk = repository.reopen_on(local(folder.path())).unwrap().disk(&map);
    let stream = || disk.stream(ByteRange::up_to(map.virtual_size), Default::default());
    // One that is dropped with all that it has begun, and two that stand still while the other one is awaited.
    let mut dropped = stream();
    assert!(dropped.next().await.unwrap().is_ok());
    drop(dropped);
    let (mut left, mut right) = (stream(), stream());
    let turns = async {
        let mut at = 0;
        while let (Some(one), Some(other)) = (left.next().await, right.next().await) {
            let ((offset, one), (_, other)) = (one.unwrap(), other.unwrap());
            assert!(offset == at as u64 && one == other && one[..] == content[at..at + one.len()]);
            at += one.len();
        }
        at
    };
    assert_eq!(tokio::time::timeout(Duration::from_secs(300), turns).await.unwrap(), content.len());
}
