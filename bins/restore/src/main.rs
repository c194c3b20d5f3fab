//! The restore program.
fn main() {}
