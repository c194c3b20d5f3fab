//! The dynamic disk header.
