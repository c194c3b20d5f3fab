//! The footer (and its copy at the front).
