//! End-to-end tests over the built programs live in `tests/tests`.
