//! The datamover program.
fn main() {}
