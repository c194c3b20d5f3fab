//! Shows that the libraries can be embedded: the example of the README, and the test that runs it.

pub mod example;
