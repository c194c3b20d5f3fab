//! Reads a whole export and prints its SHA-256, its size and the rate.
//!
//! `nbd-sha256 ADDRESS:PORT [--name NAME] [--certificate PEM] [--connections N] [--in-flight N] [--request BYTES]
//! [--window BYTES] [--no-hash]`

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::expect_used, reason = "a small program for measuring")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;
use xenvault_block::{ByteRange, ByteSize, ExtentSet};
use xenvault_nbd::{Endpoint, Export, ExportName, ExportOptions, FixedEndpoints, ReadOptions};

#[path = "../tests/support/tls.rs"]
mod tls;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or("usage: nbd-sha256 ADDRESS:PORT [options]")?.parse()?;
    let mut endpoint = Endpoint { address, tls: None, export_name: ExportName::new("") };
    // As nbdcopy does it: requests of 256 KiB, 64 for each connection at most.
    let mut options = ExportOptions { request_bytes: 256 * 1024, in_flight: 16, ..ExportOptions::default() };
    let mut read = ReadOptions::default();
    let mut hash = true;
    while let Some(argument) = arguments.next() {
        if argument == "--no-hash" {
            hash = false;
            continue;
        }
        let value = arguments.next().ok_or("an option without a value")?;
        match argument.as_str() {
            "--name" => endpoint.export_name = ExportName::new(value),
            "--certificate" => endpoint.tls = Some(tls::pinned(&PathBuf::from(value))),
            "--connections" => options.connections = value.parse()?,
            "--in-flight" => options.in_flight = value.parse()?,
            "--request" => options.request_bytes = value.parse::<ByteSize>()?.0,
            "--window" => read.window_bytes = value.parse::<ByteSize>()?.0,
            other => return Err(format!("unknown option {other}").into()),
        }
    }

    let start = Instant::now();
    let export = Export::open(Arc::new(FixedEndpoints(vec![endpoint])), options).await?;
    let extents = ExtentSet::from_range(ByteRange::up_to(export.size()));
    let mut stream = export.read_extents(extents, read);
    // Hashing has a thread of its own, a few pieces behind the reading.
    let (pieces, mut queue) = tokio::sync::mpsc::channel::<bytes::Bytes>(8);
    let hashing = tokio::task::spawn_blocking(move || {
        let mut context = ring::digest::Context::new(&ring::digest::SHA256);
        while let Some(piece) = queue.blocking_recv() {
            if hash {
                context.update(&piece);
            }
        }
        context.finish()
    });
    let mut position = 0;
    while let Some(piece) = stream.next().await {
        let (offset, data) = piece?;
        assert_eq!(offset, position, "pieces come in order and without a gap");
        position += data.len() as u64;
        pieces.send(data).await?;
    }
    drop(pieces);
    let digest = hashing.await?;
    let seconds = start.elapsed().as_secs_f64();
    export.close().await?;
    let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let rate = position as f64 / seconds / f64::from(1 << 20);
    println!(
        "{} {} {position} bytes {seconds:.3} s {rate:.0} MiB/s",
        if hash { &hex } else { "-" },
        export.counters().opened_connections
    );
    Ok(())
}
