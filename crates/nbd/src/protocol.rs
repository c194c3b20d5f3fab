//! The messages of the old dialect as bytes. Pure; all numbers are big endian on the wire.
//!
//! Only what is needed: the fixed newstyle greeting, STARTTLS and EXPORT_NAME, READ and DISC, simple replies.

use xenvault_block::{ByteRange, SECTOR_BYTES};

use crate::error::{SizeProblem, Violation};

pub(crate) const GREETING_BYTES: usize = 18;
pub(crate) const OPTION_REPLY_BYTES: usize = 20;
/// Size and flags, then padding that is only left out if both sides agreed to.
pub(crate) const EXPORT_BYTES: usize = 10 + 124;
pub(crate) const REQUEST_BYTES: usize = 28;
pub(crate) const REPLY_BYTES: usize = 16;

/// Longest export name of the protocol.
pub(crate) const MAX_NAME_BYTES: usize = 4096;
/// A reply to STARTTLS carries at most a short text.
pub(crate) const MAX_OPTION_REPLY_BYTES: u32 = 4096;

/// Fixed newstyle, and nothing that the server did not offer (X27: no "no zeroes").
pub(crate) const CLIENT_FLAGS: [u8; 4] = 1_u32.to_be_bytes();

const MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const OLD_STYLE_MAGIC: [u8; 8] = 0x0000_4202_8186_1253_u64.to_be_bytes();
const FLAG_FIXED_NEWSTYLE: u16 = 1;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const REPLY_ACK: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClientOption {
    ExportName = 1,
    Abort = 2,
    StartTls = 5,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read = 0,
    Disconnect = 2,
}

/// The reply to an option: acknowledged, or refused with this type; then so many bytes of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OptionReply {
    pub(crate) refused: Option<u32>,
    pub(crate) text_bytes: u32,
}

/// The head of a simple reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    /// 0 is success. Servers put other things than error numbers here: every other value is a failure.
    pub(crate) error: u32,
    pub(crate) handle: u64,
}

pub(crate) fn check_greeting(bytes: &[u8; GREETING_BYTES]) -> Result<(), Violation> {
    let (magic, rest) = bytes.split_at(8);
    let (option_magic, flags) = rest.split_at(8);
    if magic != MAGIC {
        return Err(Violation::Greeting);
    }
    if option_magic == OLD_STYLE_MAGIC {
        return Err(Violation::OldStyle);
    }
    if option_magic != OPTION_MAGIC {
        return Err(Violation::Greeting);
    }
    let flags = flags.iter().fold(0_u16, |flags, &byte| flags << 8 | u16::from(byte));
    if flags & FLAG_FIXED_NEWSTYLE == 0 { Err(Violation::NotFixedNewstyle) } else { Ok(()) }
}

pub(crate) fn option(option: ClientOption, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + payload.len());
    bytes.extend_from_slice(OPTION_MAGIC);
    bytes.extend_from_slice(&(option as u32).to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

pub(crate) fn option_reply(bytes: &[u8; OPTION_REPLY_BYTES], sent: ClientOption) -> Result<OptionReply, Violation> {
    let mut fields = Fields(bytes);
    if fields.u64() != OPTION_REPLY_MAGIC || fields.u32() != sent as u32 {
        return Err(Violation::OptionReply);
    }
    let kind = fields.u32();
    let text_bytes = fields.u32();
    if text_bytes > MAX_OPTION_REPLY_BYTES {
        return Err(Violation::OptionReplyLength(text_bytes));
    }
    Ok(OptionReply { refused: (kind != REPLY_ACK).then_some(kind), text_bytes })
}

/// What answers the export name: the size, or what is wrong with it.
pub(crate) enum ExportAnswer {
    Size(u64),
    Unusable(u64, SizeProblem),
    Violation(Violation),
}

pub(crate) fn export_answer(bytes: &[u8; EXPORT_BYTES]) -> ExportAnswer {
    let mut fields = Fields(bytes);
    let size = fields.u64();
    if size >= 1 << 63 {
        return ExportAnswer::Unusable(size, SizeProblem::TooLarge);
    }
    if !size.is_multiple_of(SECTOR_BYTES) {
        return ExportAnswer::Unusable(size, SizeProblem::NotSectors);
    }
    // Transmission flags: nothing that they announce is used.
    if bytes.iter().skip(10).any(|&byte| byte != 0) {
        return ExportAnswer::Violation(Violation::Padding);
    }
    ExportAnswer::Size(size)
}

/// One request; command flags are always 0, since XenServer takes them for part of the command (X27).
pub(crate) fn request(command: Command, handle: u64, offset: u64, length: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    let fields: [&[u8]; 5] = [
        &REQUEST_MAGIC.to_be_bytes(),
        &(command as u32).to_be_bytes(),
        &handle.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ];
    for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    bytes
}

pub(crate) fn reply(bytes: &[u8; REPLY_BYTES]) -> Result<Reply, Violation> {
    let mut fields = Fields(bytes);
    let magic = fields.u32();
    if magic != REPLY_MAGIC {
        return Err(Violation::ReplyMagic(magic));
    }
    Ok(Reply { error: fields.u32(), handle: fields.u64() })
}

/// Whether a range is a single request that every server of this dialect answers.
pub(crate) fn is_request(range: ByteRange, limit: u64) -> bool {
    let aligned = range.start().is_multiple_of(SECTOR_BYTES) && range.end().is_multiple_of(SECTOR_BYTES);
    aligned && !range.is_empty() && range.len() <= limit
}

/// Takes big-endian numbers off the front of a message whose length is fixed.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        // The messages are arrays as long as their fields: the fall-back is never taken.
        let (field, rest) = self.0.split_first_chunk().map_or(([0; N], &[][..]), |(field, rest)| (*field, rest));
        self.0 = rest;
        field
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn x27_requests_are_the_recorded_bytes() {
        // Sent to and answered by a real host.
        let recorded = [
            (request(Command::Read, 1, 0, 65_536), "25609513000000000000000000000001000000000000000000010000"),
            (request(Command::Read, 2, 8_388_096, 512), "2560951300000000000000000000000200000000007ffe0000000200"),
            (request(Command::Disconnect, 0, 0, 0), "25609513000000020000000000000000000000000000000000000000"),
        ];
        for (bytes, hex) in recorded {
            assert_eq!(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), hex);
        }
        assert_eq!(option(ClientOption::StartTls, &[]), b"IHAVEOPT\0\0\0\x05\0\0\0\0");
        assert_eq!(option(ClientOption::ExportName, b"/x"), b"IHAVEOPT\0\0\0\x01\0\0\0\x02/x");
    }

    #[test]
    fn greetings_are_told_apart() {
        for (greeting, result) in [
            (&b"NBDMAGICIHAVEOPT\0\x01"[..], Ok(())),
            (b"NBDMAGICIHAVEOPT\0\x03", Ok(())),
            (b"NBDMAGICIHAVEOPT\0\0", Err(Violation::NotFixedNewstyle)),
            (b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0", Err(Violation::OldStyle)),
            (b"HTTP/1.1 400 Bad R", Err(Violation::Greeting)),
            (b"NBDMAGICXXXXXXXX\0\x01", Err(Violation::Greeting)),
        ] {
            assert_eq!(check_greeting(greeting.try_into().unwrap()), result);
        }
    }

    #[test]
    fn a_reply_needs_its_magic() {
        assert_eq!(reply(b"\x67\x44\x66\x98\0\0\0\x16\0\0\0\0\0\0\0\x01"), Ok(Reply { error: 22, handle: 1 }));
        assert_eq!(reply(b"\x66\x8e\x33\xef\0\0\0\0\0\0\0\0\0\0\0\x01"), Err(Violation::ReplyMagic(0x668e_33ef)));
    }
}
