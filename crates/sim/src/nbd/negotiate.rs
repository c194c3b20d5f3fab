//! The handshake: greeting, client flags, options, up to the export name.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

const GREETING: &[u8; 18] = b"NBDMAGICIHAVEOPT\x00\x01";
const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const STARTTLS: u32 = 5;

const ACK: u32 = 1;
const ERR_UNSUP: u32 = 0x8000_0001;
const ERR_POLICY: u32 = 0x8000_0002;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_TLS_REQD: u32 = 0x8000_0005;

/// The longest payload that is kept. Longer ones are read and forgotten: no export has such a name.
const KEPT_PAYLOAD_BYTES: u64 = 64 * 1024;

/// Sends the greeting; gives whether the client knows the fixed form of the handshake.
pub(super) async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<bool> {
    stream.write_all(GREETING).await?;
    stream.flush().await?;
    // NO_ZEROES was not offered and is not looked at.
    Ok(stream.read_u32().await? & 1 == 1)
}

/// Answers options until the client asks for TLS; `false` where it asks for something that ends the connection.
pub(super) async fn until_starttls<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<bool> {
    loop {
        let (option, _) = read_option(stream).await?;
        match option {
            EXPORT_NAME | ABORT => return Ok(false),
            STARTTLS => {
                reply(stream, option, ACK).await?;
                return Ok(true);
            }
            _ => reply(stream, option, ERR_TLS_REQD).await?,
        }
    }
}

/// Answers options until the client names an export; `None` where it gives up.
pub(super) async fn until_export_name<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    inside_tls: bool,
) -> io::Result<Option<Vec<u8>>> {
    loop {
        let (option, payload) = read_option(stream).await?;
        match option {
            EXPORT_NAME => return Ok(Some(payload)),
            ABORT => {
                reply(stream, option, ACK).await?;
                return Ok(None);
            }
            LIST => reply(stream, option, ERR_POLICY).await?,
            STARTTLS => reply(stream, option, if inside_tls { ERR_INVALID } else { ERR_POLICY }).await?,
            _ => reply(stream, option, ERR_UNSUP).await?,
        }
    }
}

/// Reads an option with its payload.
async fn read_option<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<(u32, Vec<u8>)> {
    let mut magic = [0; 8];
    stream.read_exact(&mut magic).await?;
    let (option, length) = (stream.read_u32().await?, stream.read_i32().await?);
    // Lengths from 2 GiB are negative to the real server and end it too.
    let length = u64::try_from(length).map_err(io::Error::other)?;
    if &magic != OPTION_MAGIC {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut payload = Vec::new();
    let kept = length.min(KEPT_PAYLOAD_BYTES);
    let read = (&mut *stream).take(kept).read_to_end(&mut payload).await? as u64;
    let skipped = tokio::io::copy(&mut (&mut *stream).take(length - kept), &mut tokio::io::sink()).await?;
    if read + skipped < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((option, payload))
}

async fn reply<S: AsyncWrite + Unpin>(stream: &mut S, option: u32, code: u32) -> io::Result<()> {
    let mut message = [0; 20];
    let fields = message.first_chunk_mut::<16>();
    if let Some(fields) = fields {
        let value = u128::from(REPLY_MAGIC) << 64 | u128::from(option) << 32 | u128::from(code);
        *fields = value.to_be_bytes();
    }
    stream.write_all(&message).await?;
    stream.flush().await
}
