//! The objects of the pool: their classes as xapi's data model has them, and the database that holds them.

mod database;
mod defaults;
mod dump;
mod restore;
mod schema;
mod types;
mod value;

pub(crate) use database::{Change, Database, read_record};
pub(crate) use defaults::required_fields;
pub(crate) use restore::Dump;
pub(crate) use schema::{Class, Method, schema};
pub(crate) use types::Type;
pub(crate) use value::{NEVER, NULL, Value, date_text, float_text, new_ref, new_uuid, now};
