//! What a service says in XML. Foreign bytes: bounded in depth, length and number, and nothing of it is believed beyond
//! what it says.

use std::time::SystemTime;

use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use quick_xml::Reader;
use quick_xml::events::Event;
use xenvault_store_format::LockMode;

/// The longest answer that is read.
pub(crate) const MAX_ANSWER_BYTES: usize = 8 * 1024 * 1024;
/// The deepest nesting of elements.
const DEEPEST: usize = 8;
/// Most versions of one page; services send at most a thousand.
const MAX_VERSIONS: usize = 10_000;
/// Longest text of one element.
const MAX_TEXT_BYTES: usize = 8 * 1024;

/// Why an answer is not understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnswerError {
    /// No XML.
    #[error("the service's answer is no XML")]
    Xml(#[source] quick_xml::Error),
    /// Above a limit.
    #[error("the service's answer has {what}")]
    Limit {
        /// Which one.
        what: &'static str,
    },
    /// A field is missing, or says what it can not say.
    #[error("the service's answer has no usable {field}")]
    Field {
        /// Name of the element.
        field: &'static str,
    },
}

/// One version of an object, or the marker of a deletion.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Version {
    /// The object's whole key.
    pub key: String,
    /// Its version; `null` where nothing keeps versions.
    pub id: String,
    /// Whether it only says that the object is deleted.
    pub is_marker: bool,
    /// When it appeared, by the service's clock.
    pub modified: SystemTime,
    /// Length in bytes; 0 of a marker.
    pub length: u64,
    /// What the service made of its bytes: two versions with the same are the same.
    pub tag: String,
}

/// A page of a list of versions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VersionPage {
    /// By key ascending, and of one key the newest first.
    pub versions: Vec<Version>,
    /// Whether there are more pages.
    pub truncated: bool,
}

/// How long a version is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// How firmly.
    pub mode: LockMode,
    /// Until when, by the service's clock.
    pub until: SystemTime,
}

/// Calls `ended` at the end of each element with the names from the root to it and its own text.
fn walk(body: &[u8], mut ended: impl FnMut(&[String], &str) -> Result<(), AnswerError>) -> Result<(), AnswerError> {
    if body.len() > MAX_ANSWER_BYTES {
        return Err(AnswerError::Limit { what: "too many bytes" });
    }
    let text = std::str::from_utf8(body).map_err(|_| AnswerError::Field { field: "encoding" })?;
    let mut reader = Reader::from_str(text);
    let (mut path, mut texts): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    loop {
        match reader.read_event().map_err(AnswerError::Xml)? {
            Event::Start(element) => {
                if path.len() >= DEEPEST {
                    return Err(AnswerError::Limit { what: "too many levels" });
                }
                path.push(element.local_name().as_ref().to_owned());
                texts.push(String::new());
            }
            Event::Empty(element) => {
                path.push(element.local_name().as_ref().to_owned());
                ended(&path, "")?;
                path.pop();
            }
            Event::End(_) => {
                let text = texts.pop().unwrap_or_default();
                ended(&path, &text)?;
                path.pop();
            }
            Event::Text(piece) => append(&mut texts, &piece.xml10_content())?,
            Event::CData(piece) => append(&mut texts, &piece.xml10_content())?,
            Event::GeneralRef(reference) => {
                let character = match reference.resolve_char_ref() {
                    Ok(Some(character)) => character,
                    _ => match &*reference.xml10_content() {
                        "lt" => '<',
                        "gt" => '>',
                        "amp" => '&',
                        "quot" => '"',
                        "apos" => '\'',
                        _ => return Err(AnswerError::Field { field: "reference" }),
                    },
                };
                append(&mut texts, character.encode_utf8(&mut [0; 4]))?;
            }
            Event::Eof if path.is_empty() => return Ok(()),
            Event::Eof => return Err(AnswerError::Field { field: "end" }),
            _ => {}
        }
    }
}

fn append(texts: &mut [String], piece: &str) -> Result<(), AnswerError> {
    let Some(text) = texts.last_mut() else { return Ok(()) };
    if text.len() + piece.len() > MAX_TEXT_BYTES {
        return Err(AnswerError::Limit { what: "too long a text" });
    }
    text.push_str(piece);
    Ok(())
}

fn is(path: &[String], names: [&str; 2]) -> bool {
    path.iter().map(String::as_str).eq(names)
}

/// Reads a page of a list of versions whose keys were asked for in encoded form.
///
/// # Errors
/// Whatever does not fit.
pub fn version_page(body: &[u8]) -> Result<VersionPage, AnswerError> {
    #[derive(Default)]
    struct Draft {
        key: Option<String>,
        id: Option<String>,
        modified: Option<SystemTime>,
        length: u64,
        tag: String,
    }
    let (mut page, mut draft, mut is_list) = (VersionPage::default(), Draft::default(), false);
    walk(body, |path, text| {
        let [root, rest @ ..] = path else { return Ok(()) };
        if root != "ListVersionsResult" {
            return Err(AnswerError::Field { field: "ListVersionsResult" });
        }
        is_list = true;
        match rest {
            [field] if field == "IsTruncated" => page.truncated = text.trim() == "true",
            [kind] if kind == "Version" || kind == "DeleteMarker" => {
                if page.versions.len() >= MAX_VERSIONS {
                    return Err(AnswerError::Limit { what: "too many versions" });
                }
                let draft = std::mem::take(&mut draft);
                page.versions.push(Version {
                    key: draft.key.ok_or(AnswerError::Field { field: "Key" })?,
                    id: draft.id.ok_or(AnswerError::Field { field: "VersionId" })?,
                    is_marker: kind == "DeleteMarker",
                    modified: draft.modified.ok_or(AnswerError::Field { field: "LastModified" })?,
                    length: draft.length,
                    tag: draft.tag,
                });
            }
            [kind, field] if kind == "Version" || kind == "DeleteMarker" => match field.as_str() {
                "Key" => {
                    let key = percent_decode_str(text).decode_utf8();
                    draft.key = Some(key.map_err(|_| AnswerError::Field { field: "Key" })?.into_owned());
                }
                "VersionId" => draft.id = Some(text.to_owned()),
                "LastModified" => draft.modified = Some(moment(text, "LastModified")?),
                "ETag" => text.clone_into(&mut draft.tag),
                "Size" => draft.length = text.parse().map_err(|_| AnswerError::Field { field: "Size" })?,
                _ => {}
            },
            _ => {}
        }
        Ok(())
    })?;
    if is_list { Ok(page) } else { Err(AnswerError::Field { field: "ListVersionsResult" }) }
}

/// Reads how long a version is kept.
///
/// # Errors
/// Whatever does not fit.
pub fn retention(body: &[u8]) -> Result<Retention, AnswerError> {
    let (mut mode, mut until) = (None, None);
    walk(body, |path, text| {
        if is(path, ["Retention", "Mode"]) {
            mode = Some(lock_mode(text)?);
        } else if is(path, ["Retention", "RetainUntilDate"]) {
            until = Some(moment(text, "RetainUntilDate")?);
        }
        Ok(())
    })?;
    Ok(Retention {
        mode: mode.ok_or(AnswerError::Field { field: "Mode" })?,
        until: until.ok_or(AnswerError::Field { field: "RetainUntilDate" })?,
    })
}

/// Reads whether a bucket keeps versions.
///
/// # Errors
/// Whatever does not fit.
pub fn versioning(body: &[u8]) -> Result<bool, AnswerError> {
    let mut enabled = false;
    walk(body, |path, text| {
        enabled |= is(path, ["VersioningConfiguration", "Status"]) && text.trim() == "Enabled";
        Ok(())
    })?;
    Ok(enabled)
}

/// Reads whether a bucket can lock objects.
///
/// # Errors
/// Whatever does not fit.
pub fn lock_configuration(body: &[u8]) -> Result<bool, AnswerError> {
    let mut enabled = false;
    walk(body, |path, text| {
        enabled |= is(path, ["ObjectLockConfiguration", "ObjectLockEnabled"]) && text.trim() == "Enabled";
        Ok(())
    })?;
    Ok(enabled)
}

/// The mode of a lock.
pub(super) fn lock_mode(text: &str) -> Result<LockMode, AnswerError> {
    match text.trim() {
        "GOVERNANCE" => Ok(LockMode::Governance),
        "COMPLIANCE" => Ok(LockMode::Compliance),
        _ => Err(AnswerError::Field { field: "Mode" }),
    }
}

/// A moment as services write it in XML and in the headers of locks.
pub(super) fn moment(text: &str, field: &'static str) -> Result<SystemTime, AnswerError> {
    let moment: Result<Timestamp, _> = text.trim().parse();
    moment.map(SystemTime::from).map_err(|_| AnswerError::Field { field })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use proptest::prelude::*;

    use super::*;

    /// As Ceph's RADOS Gateway answers.
    const PAGE: &str = r#"<?xml version="1.0" encoding="UTF-8"?><ListVersionsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><Prefix>a%2F</Prefix><MaxKeys>1000</MaxKeys><EncodingType>url</EncodingType><IsTruncated>true</IsTruncated><DeleteMarker><Key>a%2Fb%20c</Key><VersionId>v2</VersionId><IsLatest>true</IsLatest><LastModified>2026-11-22T10:00:01.500Z</LastModified><Owner><ID>adm</ID></Owner></DeleteMarker><Version><Key>a%2Fb%20c</Key><VersionId>v1</VersionId><IsLatest>false</IsLatest><LastModified>2026-11-22T10:00:00Z</LastModified><ETag>&quot;x&quot;</ETag><Size>17</Size><StorageClass>STANDARD</StorageClass></Version></ListVersionsResult>"#;

    fn at(text: &str) -> SystemTime {
        text.parse::<Timestamp>().unwrap().into()
    }

    #[test]
    fn a_page_of_versions_is_read() {
        let page = version_page(PAGE.as_bytes()).unwrap();
        let version = |id: &str, is_marker, modified, length, tag: &str| Version {
            tag: tag.to_owned(),
            key: "a/b c".to_owned(),
            id: id.to_owned(),
            is_marker,
            modified: at(modified),
            length,
        };
        assert!(page.truncated);
        assert_eq!(
            page.versions,
            [
                version("v2", true, "2026-11-22T10:00:01.5Z", 0, ""),
                version("v1", false, "2026-11-22T10:00:00Z", 17, "\"x\"")
            ]
        );
    }

    #[test]
    fn answers_that_are_none_are_refused() {
        for (from, to) in [
            ("</ListVersionsResult>", ""),
            ("<VersionId>v1</VersionId>", ""),
            ("<Size>17</Size>", "<Size>-1</Size>"),
            ("2026-11-22T10:00:00Z", "yesterday"),
            ("ListVersionsResult", "Error"),
            ("&quot;", "&unknown;"),
        ] {
            assert!(version_page(PAGE.replace(from, to).as_bytes()).is_err(), "{from}");
        }
        assert!(version_page(b"").is_err());
        let deep = "<a>".repeat(100_000);
        assert!(matches!(version_page(deep.as_bytes()), Err(AnswerError::Limit { .. } | AnswerError::Field { .. })));
    }

    #[test]
    fn locks_and_versioning_are_read() {
        let body = "<Retention xmlns=\"x\"><Mode>COMPLIANCE</Mode><RetainUntilDate>1970-01-02T00:00:00.000Z</RetainUntilDate></Retention>";
        let expected = Retention { mode: LockMode::Compliance, until: UNIX_EPOCH + Duration::from_secs(86400) };
        assert_eq!(retention(body.as_bytes()).unwrap(), expected);
        assert!(retention(body.replace("COMPLIANCE", "NONE").as_bytes()).is_err());
        let status = |text: &str| format!("<VersioningConfiguration><Status>{text}</Status></VersioningConfiguration>");
        assert!(versioning(status("Enabled").as_bytes()).unwrap());
        assert!(!versioning(status("Suspended").as_bytes()).unwrap());
        assert!(!versioning(b"<VersioningConfiguration/>").unwrap());
        let lock = "<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled></ObjectLockConfiguration>";
        assert!(lock_configuration(lock.as_bytes()).unwrap());
    }

    proptest! {
        #[test]
        fn foreign_answers_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = (version_page(&bytes), retention(&bytes), versioning(&bytes), lock_configuration(&bytes));
        }

        #[test]
        fn answers_that_were_cut_or_changed_do_not_panic(at in 0..PAGE.len(), to in any::<u8>(), cut in any::<bool>()) {
            let mut bytes = PAGE.as_bytes().to_vec();
            bytes[at] = to;
            bytes.truncate(if cut { at } else { bytes.len() });
            if let Ok(page) = version_page(&bytes) {
                prop_assert!(page.versions.len() <= 2);
            }
        }
    }
}
