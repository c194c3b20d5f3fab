//! The operator's side of the demo: one repository, one state folder, the two programs.

use super::guests::Guest;
use super::table::Row;
use crate::run::Outcome;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use xenvault_tests::simulator::Simulator;
use xenvault_tests::{images, programs};

/// One installation of the programs, with its secrets in files.
#[derive(Debug)]
pub struct Installation {
    folder: PathBuf,
    pool: Vec<String>,
    repository: Vec<String>,
}

impl Installation {
    /// Writes the secrets and confirms the pool's fingerprint.
    pub fn new(folder: &Path, pool: &Simulator) -> Outcome<Self> {
        let path = |name: &str| folder.join(name).display().to_string();
        std::fs::write(folder.join("password"), pool.text("password")?)?;
        std::fs::write(folder.join("passphrase"), "the passphrase of the demo\n")?;
        let repository =
            ["--repository".to_owned(), path("repository"), "--passphrase-file".to_owned(), path("passphrase")];
        let (url, fingerprint, user) = (pool.text("url")?, pool.text("fingerprint")?, pool.text("user")?);
        let pool = [
            "--pool",
            url,
            "--fingerprint",
            fingerprint,
            "--user",
            user,
            "--state",
            &path("state"),
            "--password-file",
            &path("password"),
        ];
        let installation = Self {
            folder: folder.to_path_buf(),
            pool: pool.map(str::to_owned).to_vec(),
            repository: repository.to_vec(),
        };
        let shown = installation.run("xenvault-datamover", &["pin".to_owned(), url.to_owned()])?;
        let same = shown.get("fingerprint").and_then(Value::as_str).map(digits) == Some(digits(fingerprint));
        if same { Ok(installation) } else { Err("the pool shows another certificate than its console".into()) }
    }

    /// Runs the datamover on the repository alone.
    pub fn run_datamover(&self, arguments: &[&str]) -> Outcome<Value> {
        let arguments: Vec<String> =
            arguments.iter().map(|text| (*text).to_owned()).chain(self.repository.clone()).collect();
        self.run("xenvault-datamover", &arguments)
    }

    /// Backs a guest up and notes what its disk was at that moment.
    pub fn backup(&self, guest: &Guest) -> Outcome<Row> {
        let mut arguments = vec!["backup".to_owned(), "--vm".to_owned(), guest.name.clone()];
        arguments.extend(self.pool.iter().chain(&self.repository).cloned());
        let started = Instant::now();
        let report = self.run("xenvault-datamover", &arguments)?;
        let seconds = started.elapsed().as_secs_f64();
        for warning in report.get("warnings").and_then(Value::as_array).into_iter().flatten() {
            println!("   warning: {warning}");
        }
        guest.states.borrow_mut().push(guest.sha256()?);
        Row::of(&report, seconds)
    }

    /// Restores the newest point of a guest under another name and gives the UUID of the new VM.
    pub fn restore(&self, guest: &Guest, sr: &str) -> Outcome<String> {
        let points = self.points(guest)?;
        let point = points.last().ok_or("there is no point to restore")?;
        let name = format!("{} restored", guest.name);
        let mut arguments = ["vm", point, "--sr", sr, "--name", &name].map(str::to_owned).to_vec();
        arguments.extend(self.pool.iter().chain(&self.repository).cloned());
        let report = self.run("xenvault-restore", &arguments)?;
        Ok(report.get("vm_uuid").and_then(Value::as_str).ok_or("the restore names no VM")?.to_owned())
    }

    /// Every point of the guest holds the disk as it was at that backup.
    pub fn compare_points(&self, guest: &Guest) -> Outcome {
        let points = self.points(guest)?;
        let states = guest.states.borrow();
        if points.len() != states.len() {
            return Err(format!("{} backups of {} gave {} points", states.len(), guest.name, points.len()).into());
        }
        for (point, expected) in points.iter().zip(states.iter()) {
            let file = self.folder.join("point.raw");
            let mut arguments = vec!["disk".to_owned(), point.clone(), "0".to_owned(), "--to".to_owned()];
            arguments.push(file.display().to_string());
            arguments.extend(self.repository.clone());
            self.run("xenvault-restore", &arguments)?;
            images::check(&file)?;
            let found = images::sha256(&mut std::fs::File::open(&file)?)?;
            if found != *expected {
                return Err(format!("point {point} has SHA-256 {found}, the disk had {expected}").into());
            }
            std::fs::remove_file(file)?;
        }
        Ok(())
    }

    /// The pool holds nothing new but one base per disk, and the restored VM with its disk, VBD and VIF.
    pub fn assert_only_bases_are_left(pool: &Simulator, restored: &str, guests: usize) -> Outcome {
        let new = pool.new_objects()?;
        let text = |record: &Value, name: &str| record.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let vm = new.iter().find(|(class, _, record)| class == "VM" && text(record, "uuid") == restored);
        let (_, vm, _) = vm.ok_or("the restored VM is not in the pool")?;
        let of_vm = |class: &str, record: &Value| matches!(class, "VBD" | "VIF") && text(record, "VM") == *vm;
        let disks: Vec<String> = new
            .iter()
            .filter(|(class, _, record)| class == "VBD" && of_vm(class, record))
            .map(|(_, _, record)| text(record, "VDI"))
            .collect();
        let mut bases = 0;
        let mut unexpected = Vec::new();
        for (class, reference, record) in &new {
            if class == "VDI" && text(record, "type") == "cbt_metadata" {
                bases += 1;
            } else if reference != vm && !of_vm(class, record) && !disks.contains(reference) {
                unexpected.push(format!("{class} {reference}: {record}"));
            }
        }
        if !unexpected.is_empty() {
            return Err(format!("left in the pool:\n{}", unexpected.join("\n")).into());
        }
        if bases != guests {
            return Err(format!("{bases} CBT bases for {guests} disks").into());
        }
        println!("   {bases} CBT bases, the restored VM, and nothing else");
        Ok(())
    }

    /// The ids of a guest's points, oldest first.
    fn points(&self, guest: &Guest) -> Outcome<Vec<String>> {
        let mut arguments = vec!["points".to_owned(), "--vm".to_owned(), guest.name.clone()];
        arguments.extend(self.repository.clone());
        let listing = self.run("xenvault-restore", &arguments)?;
        let points = listing.get("points").and_then(Value::as_array).ok_or("no list of points")?;
        Ok(points.iter().filter_map(|point| point.get("point")?.as_str().map(str::to_owned)).collect())
    }

    fn run(&self, program: &str, arguments: &[String]) -> Outcome<Value> {
        let mut command: Command = programs::program(program)?;
        let finished = programs::finish(command.arg("--json").args(arguments), "")?;
        if finished.code == Some(0) {
            return finished.json();
        }
        Err(format!("{program} {arguments:?} ended with {:?}:\n{}", finished.code, finished.stderr).into())
    }
}

/// A fingerprint without whatever separates its digits.
fn digits(fingerprint: &str) -> String {
    fingerprint.chars().filter(char::is_ascii_hexdigit).collect::<String>().to_lowercase()
}
