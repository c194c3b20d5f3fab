//! New chunks share frames: what that saves, and that nobody waits for a frame that nobody ends.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "helpers of tests fail the test")]

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::{BLOCK, manifest, new_repository, noise, read_disk, write_disk, writer};
use xenvault_store::{DiskOptions, WriterOptions};

/// Blocks that do not compress by themselves, each of them twice with one byte of difference, 256 KiB apart.
fn almost_twice() -> Vec<u8> {
    let mut content = Vec::new();
    for number in 0..8 {
        let mut part = noise(number, 256 << 10);
        content.extend_from_slice(&part);
        part.chunks_mut(BLOCK).for_each(|block| block[100] ^= 1);
        content.extend_from_slice(&part);
    }
    content
}

#[tokio::test(flavor = "multi_thread")]
async fn what_chunks_near_each_other_have_in_common_is_stored_once() {
    let content = almost_twice();
    let mut stored = Vec::new();
    for frame_bytes in [0, 1 << 20] {
        let folder = tempfile::tempdir().unwrap();
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
    assert!(stored[0] > content.len() as u64, "{stored:?}");
    assert!(stored[1] < content.len() as u64 * 7 / 10, "{stored:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_that_stand_still_do_not_hold_up_others() {
    let folder = tempfile::tempdir().unwrap();
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
