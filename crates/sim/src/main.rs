//! `xenvault-sim serve`: a simulated pool for clients in any language. Prints one JSON line when it is ready and ends
//! on SIGTERM, SIGINT, or the end of standard input if that is a pipe.

use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use xenvault_sim::storage::SrKind;
use xenvault_sim::{DiskContent, DiskSpec, SimError, SimOptions, SimPool, SrSpec, VmSpec};

#[derive(Parser)]
#[command(name = "xenvault-sim", about = "A simulated XenServer pool for tests")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a pool on loopback addresses until standard input ends or SIGTERM comes.
    Serve {
        /// Number of hosts, one loopback address each.
        #[arg(long, default_value_t = 1)]
        hosts: usize,
        /// Number of VMs.
        #[arg(long, default_value_t = 1)]
        vms: usize,
        /// Disks of each VM; those after the first are empty.
        #[arg(long, default_value_t = 1)]
        disks_per_vm: usize,
        /// Content of the first VM's disk, the second's, and so on; VMs beyond get generated content,
        /// those after the 16th empty disks.
        #[arg(long)]
        disk: Vec<PathBuf>,
        /// Serve XenAPI without TLS.
        #[arg(long)]
        plain_http: bool,
    },
}

/// Generated content of a disk without a file, in bytes, and the size of such a disk.
const GENERATED_BYTES: u64 = 16 << 20;
const GENERATED_SIZE: u64 = 64 << 20;

/// VMs whose first disks get generated content.
const GENERATED_VMS: usize = 16;

fn main() -> ExitCode {
    let Arguments { command: Command::Serve { hosts, vms, disks_per_vm, disk, plain_http } } = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let outcome = runtime.map_err(|source| SimError::Io { what: "start".to_owned(), source }).and_then(|runtime| {
        let outcome = runtime.block_on(serve(hosts, vms, disks_per_vm, disk, plain_http));
        // A thread may sit in a read of standard input.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed: then there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "xenvault-sim: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(
    hosts: usize,
    vms: usize,
    disks_per_vm: usize,
    disks: Vec<PathBuf>,
    plain_http: bool,
) -> Result<(), SimError> {
    let vm = |index: usize| {
        let disk = match disks.get(index) {
            Some(path) => DiskSpec::file(path),
            None if index >= GENERATED_VMS => DiskSpec::new(GENERATED_SIZE),
            None => {
                let content = DiskContent::Random { seed: index as u64 + 1, bytes: GENERATED_BYTES };
                DiskSpec::new(GENERATED_SIZE).content(content)
            }
        };
        let vm = VmSpec::new(&format!("vm-{}", index + 1)).disk(disk);
        (1..disks_per_vm).fold(vm, |vm, _| vm.disk(DiskSpec::new(GENERATED_SIZE)))
    };
    let options = SimOptions {
        hosts,
        vms: (0..vms.max(disks.len())).map(vm).collect(),
        srs: vec![SrSpec::new("first", SrKind::Ext), SrSpec::new("second", SrKind::Ext)],
        plain_http,
        ..SimOptions::default()
    };
    let io = |source| SimError::Io { what: "wait for its end".to_owned(), source };
    let mut terminate = signal(SignalKind::terminate()).map_err(io)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io)?;
    let pool = SimPool::start(options).await?;
    {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", pool.description()).map_err(io)?;
        out.flush().map_err(io)?;
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = end_of_input() => {}
    }
    pool.shutdown().await;
    Ok(())
}

/// The end of standard input; never on a terminal.
async fn end_of_input() {
    if std::io::stdin().is_terminal() {
        return std::future::pending().await;
    }
    let (sender, ended) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut buffer = [0; 256];
        while matches!(input.read(&mut buffer), Ok(read) if read > 0) {}
        sender.send(())
    });
    // The other side is only dropped after it has sent.
    let _ = ended.await;
}
