//! the workflows.
