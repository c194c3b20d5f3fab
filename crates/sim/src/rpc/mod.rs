//! The two encodings of XenAPI, in xapi's exact manner, and what a call and a failure are.

mod failure;
mod json;
mod xml;

pub(crate) use failure::{Failure, Outcome};
pub(crate) use json::{json_answer, read_json_call};
pub(crate) use xml::{read_xml_call, read_xml_value, xml_answer, xml_bare, xml_fragment};
