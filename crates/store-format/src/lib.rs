//! the bytes of the repository.
