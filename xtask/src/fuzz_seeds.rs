//! Seeds of the fuzz targets that read what a pool sends: made from the recordings, never committed.

use crate::run::{Outcome, workspace};
use std::path::Path;

/// Bytes of each of the reads that the target `nbd_reply` waits for.
const READ_BYTES: usize = 4096;

const REPLY_MAGIC: [u8; 4] = [0x67, 0x44, 0x66, 0x98];

/// Writes `fuzz/corpus/<target>/<recording>` for every recording that a target can read.
///
/// # Errors
/// Where the recordings are not beside the checkout.
pub fn run() -> Outcome {
    let recordings = workspace().join("../shared/xapi-wire");
    if !recordings.is_dir() {
        return Err(
            format!("the recordings are not at {}; fuzzing works without seeds too", recordings.display()).into()
        );
    }
    let mut written = [0_usize; 3];
    for entry in std::fs::read_dir(recordings)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let text = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
        let (target, at, seed) = if name.ends_with(".xmlrpc.txt") {
            ("xenapi_xmlrpc", 0, body(&text))
        } else if name.contains(".jsonrpc") {
            ("xenapi_jsonrpc", 1, body(&text))
        } else if name.starts_with("nbd.") {
            ("nbd_reply", 2, replies(&text))
        } else {
            continue;
        };
        if let (Some(seed), Some(count)) = (seed, written.get_mut(at)) {
            write(target, name, &seed)?;
            *count += 1;
        }
    }
    let [xml, json, nbd] = written;
    println!("seeds: {xml} answers in XML-RPC, {json} in JSON-RPC, {nbd} dialogues of NBD, in fuzz/corpus");
    Ok(())
}

fn write(target: &str, name: &str, seed: &[u8]) -> Outcome {
    let folder = workspace().join("fuzz/corpus").join(target);
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join(Path::new(name).with_extension("seed")), seed)?;
    Ok(())
}

/// The body of the recorded response.
fn body(text: &str) -> Option<Vec<u8>> {
    let (_, response) = text.split_once("=== response ===")?;
    let response = response.trim_start().replace("\r\n", "\n");
    let (_, body) = response.split_once("\n\n")?;
    (!body.trim().is_empty()).then(|| body.trim().as_bytes().to_vec())
}

/// The replies in a recorded dialogue, as if they answered the reads of the target: handles counted from 1, and as much
/// payload as it asks for.
fn replies(text: &str) -> Option<Vec<u8>> {
    let mut seed = Vec::new();
    let mut handle = 0_u64;
    for line in text.lines().filter_map(|line| line.strip_prefix("< ")) {
        let bytes = hex(line.split_whitespace().next().unwrap_or_default());
        let (Some(magic), Some(error)) = (bytes.get(..4), bytes.get(4..8)) else { continue };
        if magic != REPLY_MAGIC {
            continue;
        }
        handle += 1;
        seed.extend_from_slice(magic);
        seed.extend_from_slice(error);
        seed.extend_from_slice(&handle.to_be_bytes());
        if error == [0; 4] {
            let mut payload = bytes.get(16..).unwrap_or_default().to_vec();
            payload.resize(READ_BYTES, 0);
            seed.extend_from_slice(&payload);
        }
    }
    (!seed.is_empty()).then_some(seed)
}

/// The bytes of a text of hexadecimal digits, up to the first that is none.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().map_while(|digit| digit.to_digit(16)).collect();
    let bytes = digits.chunks_exact(2).map(|pair| pair.iter().fold(0, |sum, digit| sum * 16 + digit));
    bytes.filter_map(|byte| u8::try_from(byte).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_get_handles_in_order_and_their_payload() {
        let text = "< 4e4244  # greeting\n> 2560\n< 67446698000000000000000000000064ffee  # reply\n< 67446698000000160000000000000065\n";
        let seed = replies(text).unwrap();
        assert_eq!(seed.len(), 16 + READ_BYTES + 16);
        assert_eq!(&seed[8..18], [0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xee]);
        assert_eq!(&seed[16 + READ_BYTES..], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0x16, 0, 0, 0, 0, 0, 0, 0, 2]);
        assert_eq!(replies("! connected"), None);
    }

    #[test]
    fn the_body_of_a_response_is_found() {
        let text = "=== request ===\nPOST\n\nx\n=== response ===\nHTTP/1.1 200 OK\nA: b\n\n{\"id\": 1}\n";
        assert_eq!(body(text).unwrap(), b"{\"id\": 1}");
        assert_eq!(body("=== response ===\n[nothing: closed]\n"), None);
    }
}
