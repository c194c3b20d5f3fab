//! Loads the inventory of a simulated pool of 1,000 VMs and 3,000 disks, in a process of its own, and follows changes.

use crate::run::{Outcome, cargo, output, show, target_folder};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

const VMS: u64 = 1_000;
const DISKS_OF_A_VM: u64 = 3;
const CHANGES: u64 = 10_000;

/// The load takes no longer.
const LOAD_LIMIT_SECONDS: f64 = 5.0;

/// After the last change it takes no longer until it is seen.
const BEHIND_LIMIT_SECONDS: f64 = 1.0;

/// The client's highest resident memory.
const MEMORY_LIMIT_MIB: f64 = 200.0;

/// Measures.
///
/// # Errors
/// If a limit is passed, or objects are missing.
pub fn run() -> Outcome {
    let build = ["build", "--quiet", "--release", "--package"];
    show(cargo().args(build).args(["xenvault-xenapi", "--example", "pool-inventory"]))?;
    show(cargo().args(build).args(["xenvault-sim", "--bins"]))?;
    let folder = target_folder().join("release");
    let (_pool, pool) = start_pool(&folder)?;
    let text = |name: &str| {
        let value = pool.get(name).and_then(serde_json::Value::as_str);
        value.map(str::to_owned).ok_or_else(|| format!("the simulator's line has no {name}"))
    };
    let mut client = Command::new(folder.join("examples/pool-inventory"));
    client.args([text("url")?, text("fingerprint")?, CHANGES.to_string()]).env("XENVAULT_PASSWORD", text("password")?);
    let said = String::from_utf8(output(&mut client)?)?;
    let figures: BTreeMap<&str, f64> = said
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, n)| Some((name, n.parse().ok()?)))
        .collect();
    let figure = |name: &str| figures.get(name).copied().ok_or_else(|| format!("the client did not tell {name}"));

    let (vms, vdis, events) = (figure("vms")?, figure("vdis")?, figure("events")?);
    let (load, behind, memory) = (figure("load_seconds")?, figure("behind_seconds")?, figure("peak_kib")? / 1024.0);
    println!("{vms} VMs and {vdis} VDIs: loaded in {load:.2} s");
    println!(
        "{CHANGES} changes in {:.1} s, {events} events: the last one known {behind:.2} s later; client's peak {memory:.0} MiB",
        figure("changes_seconds")?
    );
    let wanted = ((VMS * DISKS_OF_A_VM) as f64, VMS as f64);
    if vdis < wanted.0 || vms < wanted.1 {
        return Err("objects are missing in the inventory".into());
    }
    for (name, found, limit) in [
        ("seconds to load", load, LOAD_LIMIT_SECONDS),
        ("seconds behind", behind, BEHIND_LIMIT_SECONDS),
        ("MiB of memory", memory, MEMORY_LIMIT_MIB),
    ] {
        if found > limit {
            return Err(format!("{found:.2} {name}, the limit is {limit}").into());
        }
    }
    Ok(())
}

/// The simulator with its first line. It ends when its standard input does.
fn start_pool(folder: &std::path::Path) -> Outcome<(Pool, serde_json::Value)> {
    let mut command = Command::new(folder.join("xenvault-sim"));
    command.args(["serve", "--vms", &VMS.to_string(), "--disks-per-vm", &DISKS_OF_A_VM.to_string()]);
    let mut pool = Pool(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
    let output = pool.0.stdout.take().ok_or("the simulator has no output")?;
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    Ok((pool, serde_json::from_str(&line)?))
}

/// A process that ends when it is dropped.
struct Pool(Child);

impl Drop for Pool {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
