//! gzip and zstd over a stream, piece by piece.

use std::io::{self, Write};

/// Compresses what goes out.
pub(crate) enum Compressor {
    Plain,
    Gzip(Box<flate2::write::GzEncoder<Vec<u8>>>),
    Zstd(Box<zstd::stream::write::Encoder<'static, Vec<u8>>>),
}

impl Compressor {
    /// By the value of `use_compression`: `true` and `gzip` are gzip, `zstd` is zstd.
    pub(crate) fn new(wanted: Option<&str>) -> io::Result<Self> {
        Ok(match wanted {
            Some("true" | "gzip") => {
                // System 3 is Unix, as the gzip program says.
                let encoder =
                    flate2::GzBuilder::new().operating_system(3).write(Vec::new(), flate2::Compression::default());
                Self::Gzip(Box::new(encoder))
            }
            Some("zstd") => {
                let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3)?;
                // As the zstd program does.
                encoder.include_checksum(true)?;
                Self::Zstd(Box::new(encoder))
            }
            _ => Self::Plain,
        })
    }

    /// What can be sent after these bytes.
    pub(crate) fn push(&mut self, bytes: Vec<u8>) -> io::Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(bytes),
            Self::Gzip(encoder) => {
                encoder.write_all(&bytes)?;
                Ok(std::mem::take(encoder.get_mut()))
            }
            Self::Zstd(encoder) => {
                encoder.write_all(&bytes)?;
                Ok(std::mem::take(encoder.get_mut()))
            }
        }
    }

    /// What is left at the end.
    pub(crate) fn finish(self) -> io::Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(Vec::new()),
            Self::Gzip(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
        }
    }
}

/// Expands what comes in; the compression is known by its first bytes.
pub(crate) enum Expander {
    Plain,
    Gzip(Box<flate2::write::GzDecoder<Vec<u8>>>),
    Zstd(Box<zstd::stream::write::Decoder<'static, Vec<u8>>>),
}

impl Expander {
    /// By the first four bytes of the body.
    pub(crate) fn new(first: &[u8]) -> io::Result<Self> {
        Ok(match first {
            [0x1f, 0x8b, ..] => Self::Gzip(Box::new(flate2::write::GzDecoder::new(Vec::new()))),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd(Box::new(zstd::stream::write::Decoder::new(Vec::new())?)),
            _ => Self::Plain,
        })
    }

    /// What these bytes expand to.
    pub(crate) fn push(&mut self, bytes: Vec<u8>) -> io::Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(bytes),
            Self::Gzip(decoder) => {
                decoder.write_all(&bytes)?;
                decoder.flush()?;
                Ok(std::mem::take(decoder.get_mut()))
            }
            Self::Zstd(decoder) => {
                decoder.write_all(&bytes)?;
                decoder.flush()?;
                Ok(std::mem::take(decoder.get_mut()))
            }
        }
    }
}
