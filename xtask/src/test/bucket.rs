//! The tests of the repository once more, in a bucket of a real S3 service that lives as long as they run.

use crate::run::{Outcome, cargo, show};
use xenvault_tests::ceph::{ACCESS_KEY, Ceph, SECRET_KEY};

/// Told to the tests of the repository: endpoint, bucket, access key, secret key.
pub const VARIABLE: &str = "XENVAULT_TEST_S3";

/// The bucket that they share; each test has a folder of its own in it.
const BUCKET: &str = "tests";

/// Starts Ceph's gateway, and runs them.
///
/// # Errors
/// What did not start; that a test failed.
pub fn run(nextest: bool, profile: &[&str]) -> Outcome {
    let ceph = Ceph::start()?;
    ceph.make_bucket(BUCKET, false)?;
    let mut tests = cargo();
    let package = ["--package", "xenvault-store", "--no-fail-fast"];
    if nextest {
        tests.args(["nextest", "run"]).args(package).args(["--test", "*"]);
        tests.args(if profile.is_empty() { &[][..] } else { &["--cargo-profile", "release"][..] });
    } else {
        tests.arg("test").args(package).args(["--test", "*"]).args(profile);
    }
    // Models that keep their store in memory have nothing to do with any place.
    if nextest {
        tests.args(["-E", "not binary(/^sweep_(model|crashes)$/)"]);
    }
    show(tests.env(VARIABLE, format!("{} {BUCKET} {ACCESS_KEY} {SECRET_KEY}", ceph.endpoint())))
}
