//! What is in an export name: a disk and a session, in the form of a URI.

use percent_encoding::percent_decode_str;

use super::ExportRequest;

/// Takes a name apart as the server's URI library does; `None` where there is no `session_id`.
///
/// The first character of the path is dropped whatever it is: without the leading slash the uuid lacks its first
/// letter, and no disk is found.
pub(super) fn parse(name: &[u8]) -> Option<ExportRequest> {
    let name = std::str::from_utf8(name).ok()?;
    let name = name.split_once('#').map_or(name, |(before, _)| before);
    let (path, query) = name.split_once('?')?;
    let session = query.split('&').filter_map(|pair| pair.split_once('=')).find_map(|(key, value)| {
        let key = percent_decode_str(key).decode_utf8().ok()?;
        (key == "session_id").then(|| percent_decode_str(&value.replace('+', " ")).decode_utf8_lossy().into_owned())
    })?;
    let path = percent_decode_str(path).decode_utf8_lossy();
    let mut letters = path.chars();
    letters.next();
    Some(ExportRequest { vdi_uuid: letters.as_str().to_owned(), session })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_name_panics(name in proptest::collection::vec(any::<u8>(), 0..80), text in "[/?&=%+#a-z_]{0,40}") {
            let _ = parse(&name);
            let _ = parse(text.as_bytes());
        }
    }

    #[test]
    fn names_are_read_as_uris() {
        let read = |name: &str| parse(name.as_bytes()).map(|request| (request.vdi_uuid, request.session));
        let pair = |vdi: &str, session: &str| Some((vdi.to_owned(), session.to_owned()));
        assert_eq!(read("/abc?session_id=OpaqueRef:1"), pair("abc", "OpaqueRef:1"));
        assert_eq!(read("/abc?session_id=OpaqueRef%3A1&x=y"), pair("abc", "OpaqueRef:1"));
        assert_eq!(read("/abc?x=y&session_id=1#z"), pair("abc", "1"));
        assert_eq!(read("abc?session_id=1"), pair("bc", "1"));
        assert_eq!(read("/x/abc?session_id=1"), pair("x/abc", "1"));
        for name in ["", "/abc", "/abc?session=1", "/abc?session_id"] {
            assert_eq!(read(name), None, "{name}");
        }
        assert_eq!(parse(b"/abc?session_id=\xff"), None);
    }

    #[test]
    fn the_session_is_not_printed() {
        let request = parse(b"/abc?session_id=secret").unwrap();
        assert!(!format!("{request:?}").contains("secret"));
    }
}
