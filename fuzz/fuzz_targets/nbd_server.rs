//! Whatever a server sends, the client ends in order: no panic, no hang, no memory that was not asked for.
#![no_main]

use std::net::SocketAddr;

use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use xenvault_block::ByteRange;
use xenvault_nbd::{Connection, Endpoint, ExportName, Timeouts};

fuzz_target!(|input: (u8, &[u8])| {
    let (good, noise) = input;
    let mut bytes = Vec::new();
    // Some inputs begin behind a handshake that works.
    if good & 1 != 0 {
        bytes.extend(b"NBDMAGICIHAVEOPT\0\x01");
        if good & 2 != 0 {
            bytes.extend((1_u64 << 20).to_be_bytes());
            bytes.extend([0; 126]);
        }
    }
    bytes.extend(noise);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        tokio::spawn(async move {
            let _ = theirs.write_all(&bytes).await;
            let _ = theirs.shutdown().await;
            let _ = theirs.read_to_end(&mut Vec::new()).await;
        });
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let endpoint = Endpoint { address, tls: None, export_name: ExportName::new("name") };
        let Ok(connection) = Connection::open_stream(ours, &endpoint, &Timeouts::default()).await else { return };
        if connection.size() >= 8192 {
            let reads = [0, 4096].map(|at| ByteRange::new(at, at + 4096).expect("a range"));
            let [first, second] = reads.map(|range| connection.read(range));
            let _ = tokio::join!(first, second);
        }
        let _ = connection.disconnect().await;
    });
});
