//! changed-block bitmaps and base decisions.
