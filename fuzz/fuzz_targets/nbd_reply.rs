//! What a server sends behind a good handshake, while three reads wait: wrong handles, lengths, errors, garbage.
#![no_main]

use std::net::SocketAddr;

use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use xenvault_block::ByteRange;
use xenvault_nbd::{Connection, Endpoint, ExportName, Timeouts};

const READ_BYTES: u64 = 4096;

fuzz_target!(|replies: &[u8]| {
    let mut handshake = b"NBDMAGICIHAVEOPT\0\x01".to_vec();
    handshake.extend((1_u64 << 20).to_be_bytes());
    handshake.extend([0; 126]);
    let replies = replies.to_vec();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        tokio::spawn(async move {
            let _ = theirs.write_all(&handshake).await;
            // Flags, the option with the name, and three requests: replies to what was not asked are another matter.
            let _ = theirs.read_exact(&mut [0; 4 + 16 + 4 + 3 * 28]).await;
            let _ = theirs.write_all(&replies).await;
            let _ = theirs.shutdown().await;
            let _ = theirs.read_to_end(&mut Vec::new()).await;
        });
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let endpoint = Endpoint { address, tls: None, export_name: ExportName::new("name") };
        let connection = Connection::open_stream(ours, &endpoint, &Timeouts::default()).await.expect("a handshake");
        let read = |at| connection.read(ByteRange::new(at, at + READ_BYTES).expect("a range"));
        let (first, second, third) = tokio::join!(read(0), read(READ_BYTES), read(2 * READ_BYTES));
        for bytes in [first, second, third].into_iter().flatten() {
            assert_eq!(bytes.len() as u64, READ_BYTES);
        }
        let _ = connection.disconnect().await;
    });
});
