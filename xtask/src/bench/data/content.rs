//! Content that no package brings: logs, a database, data that does not compress.

use crate::run::{Outcome, output};
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A row of numbers that look random, the same for the same seed (splitmix64).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// Data that does not compress, such as films and archives.
pub(crate) fn write_noise(path: &Path, seed: u64, length: u64) -> Outcome {
    let (mut file, mut numbers) = (BufWriter::new(File::create(path)?), Numbers(seed));
    for _ in 0..length / 8 {
        file.write_all(&numbers.next().to_le_bytes())?;
    }
    file.flush()?;
    Ok(())
}

/// A system log of this length. A longer one of the same seed begins with the shorter one.
pub(crate) fn write_log(path: &Path, seed: u64, length: u64) -> Outcome {
    let (mut file, mut numbers) = (BufWriter::new(File::create(path)?), Numbers(seed));
    let (mut written, mut second) = (0, 0_u64);
    while written < length {
        second += numbers.below(9);
        let (day, hour, minute) = (1 + second / 86_400 % 28, second / 3600 % 24, second / 60 % 60);
        let head = format!("Oct {day:2} {hour:02}:{minute:02}:{:02} guest-{seed}", second % 60);
        let (a, b) = (numbers.below(60_000), numbers.below(1 << 16));
        let line = match numbers.below(6) {
            0 => format!(
                "{head} sshd[{a}]: Accepted publickey for deploy from 10.{}.{}.7 port {b} ssh2\n",
                b >> 8,
                b % 256
            ),
            1 => format!("{head} systemd[1]: session-{a}.scope: Deactivated successfully.\n"),
            2 => format!(
                "{head} CRON[{a}]: (root) CMD (test -x /usr/sbin/anacron || run-parts --report /etc/cron.hourly)\n"
            ),
            3 => format!(
                "{head} kernel: [{second}.{b:06}] audit: type=1400 apparmor=\"STATUS\" operation=\"profile_load\" pid={a}\n"
            ),
            _ => format!(
                "{head} nginx: 192.0.2.{} \"GET /items/{:x}?page={} HTTP/1.1\" {} {b} \"Mozilla/5.0 (X11; Linux x86_64)\" rt=0.{:03}\n",
                b % 256,
                numbers.next() >> 24,
                a % 50,
                if a % 40 == 0 { 404 } else { 200 },
                a % 1000
            ),
        };
        written += line.len() as u64;
        file.write_all(line.as_bytes())?;
    }
    file.flush()?;
    Ok(())
}

/// A database with pages of 8 KiB, as it is at each generation.
pub(crate) struct Database {
    states: Vec<PathBuf>,
}

/// Rows of the table: about 110 MB.
const ROWS: u64 = 400_000;
/// Rows that change from one generation to the next, all over the table.
const CHANGED_ROWS: u64 = 1_500;

impl Database {
    pub(crate) fn make(work: &Path, generations: usize) -> Outcome<Self> {
        let mut states = Vec::new();
        let mut numbers = Numbers(7);
        for generation in 0..generations {
            let path = work.join(format!("data-{generation}.db"));
            let mut script = String::new();
            if generation == 0 {
                script.push_str("PRAGMA page_size=8192; PRAGMA journal_mode=OFF; BEGIN;\n");
                script.push_str("CREATE TABLE account(id INTEGER PRIMARY KEY, name TEXT, mail TEXT, balance INTEGER, token BLOB, note TEXT);\n");
                for id in 0..ROWS {
                    script.push_str(&format!("INSERT INTO account VALUES({id},{});\n", row(&mut numbers)));
                }
            } else {
                std::fs::copy(work.join(format!("data-{}.db", generation - 1)), &path)?;
                script.push_str("PRAGMA journal_mode=OFF; BEGIN;\n");
                for _ in 0..CHANGED_ROWS {
                    let (id, balance, token) = (numbers.below(ROWS), numbers.below(1_000_000), numbers.next());
                    // The same length as before, so that rows stay on their pages.
                    script.push_str(&format!(
                        "UPDATE account SET balance={balance}, token=x'{token:016x}' WHERE id={id};\n"
                    ));
                }
            }
            script.push_str("COMMIT;\n");
            let mut sqlite = Command::new("sqlite3").arg(&path).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
            sqlite.stdin.take().ok_or("sqlite3 has no input")?.write_all(script.as_bytes())?;
            let status = sqlite.wait()?;
            if !status.success() {
                return Err(format!("sqlite3 ended with {status}").into());
            }
            output(Command::new("sqlite3").arg(&path).arg("PRAGMA quick_check"))?;
            states.push(path);
        }
        Ok(Self { states })
    }

    /// The file at this generation, counted from 0.
    pub(crate) fn state(&self, generation: usize) -> PathBuf {
        self.states.get(generation).or(self.states.last()).cloned().unwrap_or_default()
    }
}

const WORDS: [&str; 24] = [
    "invoice", "paid", "open", "reminder", "customer", "asked", "for", "delivery", "on", "Monday", "address",
    "changed", "contract", "renewed", "refund", "issued", "support", "ticket", "closed", "by", "phone", "discount",
    "granted", "late",
];

fn row(numbers: &mut Numbers) -> String {
    let (first, balance, token) = (numbers.next(), numbers.below(1_000_000), numbers.next());
    let note: Vec<&str> = (0..8 + numbers.below(24))
        .filter_map(|_| WORDS.get(usize::try_from(numbers.below(WORDS.len() as u64)).unwrap_or_default()).copied())
        .collect();
    let name = first % 1_000_000;
    format!(
        "'user {name}','u{:x}@mail{}.example',{balance},x'{token:016x}','{}'",
        first >> 20,
        first % 12,
        note.join(" ")
    )
}
