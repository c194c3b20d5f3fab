//! The disks that the repository is measured on: three generations of three related Linux VMs, made from real files.
//!
//! Each disk has a partition table and one file system, ext4 or XFS, with files of this machine, Debian packages in
//! their older versions, logs, a database and data that does not compress. From one generation to the next packages are
//! updated, kernels installed and removed, logs grow, and pages of the database are rewritten where they lie.
//!
//! What is chosen depends only on what this machine and its package sources hold; it is made once, and kept.

mod content;
mod ext4;
mod packages;
mod tree;
mod xfs;

use crate::run::{Outcome, target_folder};
use crate::test::tools::{self, Tool};
use packages::{Kernel, Update};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use tree::Tree;

/// What making the disks needs beyond the packages that end up on them.
const TOOLS: &[Tool] = &[
    ("mke2fs", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("xfs_repair", "xfsprogs"),
    ("faketime", "faketime"),
    ("sqlite3", "sqlite3"),
    ("dpkg-deb", "dpkg"),
];

/// Whoever changes what the disks hold changes this, and they are made anew.
const RECIPE: &str = "1";

/// Size of each disk, in bytes.
const DISK_BYTES: u64 = 1 << 30;
/// Where the file system begins, as partitioning programs do it.
const PARTITION_OFFSET: u64 = 1 << 20;
/// Generations of each disk.
pub const GENERATIONS: usize = 3;
/// The disks, by the names of their files.
pub const DISKS: [&str; 3] = ["web.raw", "database.raw", "build.raw"];

/// The disks on the medium.
#[derive(Debug)]
pub struct DataSet {
    folder: PathBuf,
    /// Bytes of all disks of all generations, holes included.
    pub virtual_bytes: u64,
    /// Of these, bytes that are not in holes of the files.
    pub allocated_bytes: u64,
}

impl DataSet {
    /// The disks; made if they are not there yet, which takes some minutes and about 6 GB.
    pub fn provide() -> Outcome<Self> {
        let folder = target_folder().join("bench/disks");
        let stamp = folder.join("complete");
        if !fs::read_to_string(&stamp).is_ok_and(|made| made == RECIPE) {
            tools::provide(TOOLS)?;
            if folder.exists() {
                fs::remove_dir_all(&folder)?;
            }
            make(&folder)?;
            fs::write(&stamp, RECIPE)?;
        }
        let mut set = Self { folder, virtual_bytes: 0, allocated_bytes: 0 };
        for generation in 1..=GENERATIONS {
            for disk in DISKS {
                use std::os::unix::fs::MetadataExt as _;
                let metadata = fs::metadata(set.generation(generation).join(disk))?;
                set.virtual_bytes += metadata.len();
                set.allocated_bytes += metadata.blocks() * 512;
            }
        }
        Ok(set)
    }

    /// The folder with the folders of all generations.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder with the disks of one generation, counted from 1.
    pub fn generation(&self, number: usize) -> PathBuf {
        self.folder.join(format!("generation-{number}"))
    }
}

/// What a guest is there for; the rest of its disk is that of its sisters.
struct Guest {
    disk: &'static str,
    /// Its packages beside those that every guest has; updated in the third generation.
    packages: &'static [&'static str],
    /// Folders of this machine, with the bytes to take of each.
    folders: &'static [(&'static str, u64)],
    seed: u64,
}

const MIB: u64 = 1 << 20;

/// Folders that every guest has, with the bytes to take of each.
const COMMON_FOLDERS: [(&str, u64); 10] = [
    ("/etc", 4 * MIB),
    ("/usr/bin", 50 * MIB),
    ("/usr/lib/x86_64-linux-gnu", 90 * MIB),
    ("/usr/lib/python3.11", 30 * MIB),
    ("/usr/share/doc", 15 * MIB),
    ("/usr/share/locale", 30 * MIB),
    ("/usr/share/man", 15 * MIB),
    ("/usr/share/perl", 15 * MIB),
    ("/usr/share/zoneinfo", 4 * MIB),
    ("/var/lib/dpkg/info", 15 * MIB),
];

/// Packages that every guest has in an older version first; updated in the second generation.
const COMMON_PACKAGES: [&str; 9] = [
    "curl",
    "git",
    "libgnutls30",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libssl3",
    "libxml2",
    "openssl",
    "perl-base",
];

const GUESTS: [Guest; 3] = [
    Guest { disk: "web.raw", packages: &["libnode108", "nodejs", "php8.2-cli"], folders: &[], seed: 1 },
    Guest { disk: "database.raw", packages: &["libpq5", "postgresql-15"], folders: &[], seed: 2 },
    Guest {
        disk: "build.raw",
        packages: &["libavcodec59", "samba-libs"],
        folders: &[("/usr/lib/gcc", 60 * MIB), ("/usr/lib/git-core", 10 * MIB)],
        seed: 3,
    },
];

/// Bytes of log at the first generation, and by how much it grows.
const LOG_BYTES: (u64, u64) = (16 * MIB, 8 * MIB);
/// Bytes of incompressible data at the first generation, and what each later one brings.
const NOISE_BYTES: (u64, u64) = (40 * MIB, 12 * MIB);

/// Where things stand inside of the guests.
const LOG_PATH: &str = "var/log/syslog";
const DATABASE_PATH: &str = "var/lib/application/data.db";

fn make(folder: &Path) -> Outcome {
    let work = folder.join("work");
    for generation in 1..=GENERATIONS {
        fs::create_dir_all(folder.join(format!("generation-{generation}")))?;
    }
    fs::create_dir_all(&work)?;
    println!("making the disks in {}: some minutes, once", folder.display());
    let kernels = packages::kernels(&work, GENERATIONS)?;
    let common = packages::updates(&work, &COMMON_PACKAGES)?;
    let mut base = Tree::default();
    for (root, bytes) in COMMON_FOLDERS {
        base.add_folder(Path::new(root), bytes)?;
    }
    let database = content::Database::make(&work, GENERATIONS)?;
    for guest in &GUESTS {
        println!("  {}", guest.disk);
        let own = packages::updates(&work, guest.packages)?;
        let mut tree = base.clone();
        for (root, bytes) in guest.folders {
            tree.add_folder(Path::new(root), *bytes)?;
        }
        let states = states(&work, guest, &tree, &common, &own, &kernels, &database)?;
        let images = if guest.disk == "build.raw" {
            xfs::images(&work, &states, DISK_BYTES - PARTITION_OFFSET)?
        } else {
            ext4::images(&work, &states, DISK_BYTES - PARTITION_OFFSET)?
        };
        for (number, image) in (1..).zip(images) {
            let disk = folder.join(format!("generation-{number}")).join(guest.disk);
            partition(&image, &disk)?;
            fs::remove_file(image)?;
        }
    }
    fs::remove_dir_all(work)?;
    Ok(())
}

/// A guest at one generation: everything that is on its disk.
pub(crate) struct State {
    pub(crate) tree: Tree,
    /// The database as it lies on the disk since the generation before, if only pages of it change.
    pub(crate) in_place: Option<(PathBuf, PathBuf)>,
}

#[allow(clippy::too_many_arguments, reason = "the parts that a guest is made of")]
fn states(
    work: &Path,
    guest: &Guest,
    base: &Tree,
    common: &[Update],
    own: &[Update],
    kernels: &[Kernel],
    database: &content::Database,
) -> Outcome<Vec<State>> {
    let mut states = Vec::new();
    let mut tree = base.clone();
    for generation in 0..GENERATIONS {
        let of_packages = |update: &Update, since: usize| {
            if generation >= since { update.newer.clone() } else { update.older.clone() }
        };
        for update in common {
            tree.add_package(&of_packages(update, 1))?;
        }
        for update in own {
            tree.add_package(&of_packages(update, 2))?;
        }
        // The kernel before stays for one generation, as package managers do it.
        for (number, kernel) in kernels.iter().enumerate() {
            if number == generation {
                tree.add_package(&kernel.files)?;
            } else if number + 1 < generation {
                tree.remove_package(&kernel.files)?;
            }
        }
        let log = work.join(format!("log-{}-{generation}", guest.seed));
        content::write_log(&log, guest.seed, LOG_BYTES.0 + LOG_BYTES.1 * generation as u64)?;
        tree.add_file(Path::new(LOG_PATH), &log);
        let noise = work.join(format!("noise-{}-{generation}", guest.seed));
        let length = if generation == 0 { NOISE_BYTES.0 } else { NOISE_BYTES.1 };
        content::write_noise(&noise, guest.seed * 100 + generation as u64, length)?;
        tree.add_file(&PathBuf::from(format!("srv/media/{generation}.mp4")), &noise);
        let state = database.state(generation);
        let mut in_place = None;
        if guest.disk == "database.raw" {
            tree.add_file(Path::new(DATABASE_PATH), &state);
            in_place = (generation > 0).then(|| (PathBuf::from(DATABASE_PATH), state));
        }
        states.push(State { tree: tree.clone(), in_place });
    }
    Ok(states)
}

/// A disk with a partition table and this file system.
fn partition(image: &Path, disk: &Path) -> Outcome {
    let source = File::open(image)?;
    let target = File::create(disk)?;
    target.set_len(DISK_BYTES)?;
    let sector = |bytes: u64| u32::try_from(bytes / 512).unwrap_or(u32::MAX).to_le_bytes();
    // One Linux partition in a classic partition table.
    let mut entry = vec![0, 0, 0, 0, 0x83, 0, 0, 0];
    entry.extend_from_slice(&sector(PARTITION_OFFSET));
    entry.extend_from_slice(&sector(DISK_BYTES - PARTITION_OFFSET));
    target.write_all_at(&entry, 446)?;
    target.write_all_at(&[0x55, 0xaa], 510)?;
    let (mut source, mut buffer, mut at) = (std::io::BufReader::new(source), vec![0; 65_536], PARTITION_OFFSET);
    loop {
        let mut filled = 0;
        while let Some(room) = buffer.get_mut(filled..).filter(|room| !room.is_empty()) {
            match source.read(room)? {
                0 => break,
                count => filled += count,
            }
        }
        let Some(bytes) = buffer.get(..filled).filter(|bytes| !bytes.is_empty()) else { return Ok(()) };
        // What is zero stays a hole, as on the storage of a pool.
        if bytes.iter().any(|&byte| byte != 0) {
            target.write_all_at(bytes, at)?;
        }
        at += filled as u64;
    }
}
