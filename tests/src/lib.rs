//! What end-to-end tests and the demo have in common: the built programs, the simulated pool as a process, real file
//! systems in files. The tests themselves lie in `tests/tests`.

pub mod ceph;
pub mod clients;
pub mod images;
pub mod liar;
pub mod programs;
pub mod proxy;
pub mod s3;
pub mod simulator;

/// What the helpers return: any failure ends a test or the demo, so a text is enough.
pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;
