//! Loads the inventory of a pool, makes changes in it, follows them, and prints what that took.
//!
//! `pool-inventory URL FINGERPRINT CHANGES`, with the password of `root` in `XENVAULT_PASSWORD`. It changes descriptions
//! of VMs: for simulated pools only.

#![allow(clippy::print_stdout, reason = "a small program for measuring")]

use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use xenvault_xenapi::inventory::{Inventory, InventoryOptions};
use xenvault_xenapi::{ConnectOptions, Session, Trust, vdi, vm};

/// Changes that are asked for at the same time.
const AT_ONCE: usize = 8;

/// No event takes longer, on however busy a machine.
const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: pool-inventory URL FINGERPRINT CHANGES";
    let (url, fingerprint) = (arguments.next().ok_or(usage)?, arguments.next().ok_or(usage)?);
    let changes: usize = arguments.next().ok_or(usage)?.parse()?;
    let password = std::env::var("XENVAULT_PASSWORD")?;
    let trust = Trust::Fingerprint(fingerprint.parse()?);
    let session = Session::login(ConnectOptions::new(&url, "root", password, trust)).await?;

    let started = Instant::now();
    let inventory = Inventory::start(&session, InventoryOptions::default());
    let first = inventory.ready().await?;
    println!("load_seconds {:.3}", started.elapsed().as_secs_f64());
    let (vms, vdis) = (first.all::<vm::Record>(), first.all::<vdi::Record>());
    let targets: Vec<vm::Ref> = vms
        .iter()
        .filter(|(_, record)| !record.is_control_domain && !record.is_a_template)
        .map(|(reference, _)| reference.clone())
        .collect();
    println!("vms {}", targets.len());
    println!("vdis {}", vdis.len());
    drop(first);

    let started = Instant::now();
    let describe = |number: usize| {
        let (session, target) = (&session, number.checked_rem(targets.len()).and_then(|at| targets.get(at)));
        async move {
            match target {
                Some(target) => vm::set_name_description(session, target, &format!("change {number}")).await,
                None => Ok(()),
            }
        }
    };
    futures::stream::iter(0..changes).map(describe).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
    // Of each VM the last change that it got; those of one VM are far apart, so that none overtakes another.
    let last = (changes.saturating_sub(targets.len())..changes).filter_map(|number| {
        let at = number.checked_rem(targets.len())?;
        Some((targets.get(at)?.clone(), format!("change {number}")))
    });
    let last: Vec<(vm::Ref, String)> = last.collect();
    let made = Instant::now();
    let followed = inventory.wait_until(|now| {
        let known = |(vm, text): &(vm::Ref, String)| now.get(vm).is_some_and(|vm| vm.name_description == *text);
        last.iter().all(known).then_some(())
    });
    tokio::time::timeout(PATIENCE, followed).await??;
    println!("changes_seconds {:.3}", made.duration_since(started).as_secs_f64());
    println!("behind_seconds {:.3}", made.elapsed().as_secs_f64());
    println!("events {}", inventory.status().events);
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("the kernel does not tell VmHWM")?;
    println!("peak_kib {}", peak.trim().trim_end_matches(" kB"));
    drop(inventory);
    session.logout().await?;
    Ok(())
}
