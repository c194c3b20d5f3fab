//! What the test of the recordings is made of.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    dead_code,
    reason = "helpers of tests, of which each test uses its part"
)]

pub mod cases;
pub mod recording;
pub mod shape;
pub mod world;
