//! the repository.
