//! `cargo xtask demo`: the whole line once, with the real programs, on a simulated pool with real file systems.
//!
//! Three VMs are backed up, files inside their disks are changed, they are backed up again, one is restored to the
//! other SR. The demo ends with an error if anything is not as it must be: bytes, file system, or left-overs.

mod guests;
mod installation;
mod table;

use crate::run::{Outcome, target_folder};
use crate::test::{self, tools};
use guests::Guest;
use installation::Installation;
use std::time::Instant;
use xenvault_tests::simulator::Simulator;
use xenvault_tests::{images, programs};

/// Runs it and prints the table.
///
/// # Errors
/// The first thing that is not as it must be.
pub fn run() -> Outcome {
    tools::provide(tools::FOR_DEMO)?;
    let folder = test::build_programs(false)?;
    programs::use_folder(folder);
    let started = Instant::now();

    std::fs::create_dir_all(target_folder())?;
    let work = tempfile::Builder::new().prefix("demo-").tempdir_in(target_folder())?;
    step("making three ext4 file systems from real files");
    let guests = guests::make(work.path())?;
    let pool = start_pool(&guests)?;
    let installation = Installation::new(work.path(), &pool)?;
    installation.run_datamover(&["init-repository"])?;

    let mut rows = Vec::new();
    for guest in &guests {
        step(&format!("backing up {}", guest.name));
        rows.push(installation.backup(guest)?);
    }
    for guest in &guests {
        step(&format!("changing files inside the disk of {}, and backing it up again", guest.name));
        guest.change(&pool)?;
        let row = installation.backup(guest)?;
        if row.level != "INC" {
            return Err(format!("{} was read as a whole again: {}", guest.name, row.reason).into());
        }
        rows.push(row);
    }

    let guest = guests.first().ok_or("the demo has no guests")?;
    step(&format!("restoring {} to the other SR", guest.name));
    let restored = installation.restore(guest, "second")?;
    compare(guest, &pool, &restored)?;
    for guest in &guests {
        step(&format!("reading both points of {} from the repository", guest.name));
        installation.compare_points(guest)?;
    }
    step("looking for what is left in the pool");
    Installation::assert_only_bases_are_left(&pool, &restored, guests.len())?;

    println!();
    println!("{}", table::render(&rows));
    println!(
        "demo: every comparison equal, nothing but CBT bases left in the pool, {:.0} s",
        started.elapsed().as_secs_f32()
    );
    Ok(())
}

fn start_pool(guests: &[Guest]) -> Outcome<Simulator> {
    let mut arguments = vec!["--hosts".to_owned(), "2".to_owned(), "--vms".to_owned(), guests.len().to_string()];
    for guest in guests {
        arguments.push("--disk".to_owned());
        arguments.push(guest.image.display().to_string());
    }
    Simulator::start(&arguments)
}

/// The restored disk is the source disk at the time of the snapshot, and its file system is in order.
fn compare(guest: &Guest, pool: &Simulator, restored_vm: &str) -> Outcome {
    let copy = guest.image.with_extension("restored");
    pool.save_guest_disk(restored_vm, "0", guest.size, &copy)?;
    images::check(&copy)?;
    let expected = images::sha256(&mut std::fs::File::open(&guest.image)?)?;
    let found = images::sha256(&mut std::fs::File::open(&copy)?)?;
    if expected != found {
        return Err(format!("the restored disk of {} has SHA-256 {found}, the source {expected}", guest.name).into());
    }
    println!("   e2fsck: clean; SHA-256 of both disks: {expected}");
    Ok(())
}

fn step(text: &str) {
    println!("-- {text}");
}
