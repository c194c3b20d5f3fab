//! VHD 1.0. Now: the head of a dynamic disk's stream to an allocation map, and the encoders of such a stream. Pure.
//!
//! Floor 1. [`HeadParser`] takes the front of a stream as it comes from a socket (footer copy, header, block allocation
//! table) and gives an [`AllocationMap`]; it holds no more than the table. [`DynamicLayout`] encodes a dynamic disk front
//! to back with all lengths known ahead. Sizes come from `current_size`, never from the geometry.

mod bytes;
mod error;
mod footer;
mod head;
mod header;
mod layout;

pub use error::VhdError;
pub use head::{AllocationMap, HeadParser, HeadProgress};
pub use layout::{DynamicLayout, LayoutOptions};
