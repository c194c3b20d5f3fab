//! Every recording of a real xapi is played against the simulator: status, headers that matter, shape of the body,
//! error code and parameters must be the same. A recording that is neither compared nor left out by name is a failure.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    dead_code,
    reason = "helpers of tests, of which each test uses its part"
)]

#[path = "../../../tests/support/shared.rs"]
mod shared;
mod transcripts_support;
mod wire;

use std::path::{Path, PathBuf};

use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use transcripts_support::cases::{CASES, LEFT_OUT};
use transcripts_support::recording::{Recording, answer_of, described_length};
use transcripts_support::shape::differences;
use transcripts_support::world::{DISK, World};
use wire::{Answer, exchange};

/// By the file's name if it has a case of its own, else by what it is about.
fn case(name: &str, stem: &str) -> (Vec<&'static str>, Vec<&'static str>) {
    let find = |wanted: &str| CASES.iter().find(|(known, ..)| *known == wanted);
    match find(name).or_else(|| find(stem)) {
        Some((_, parts, steps)) => (parts.split_whitespace().collect(), steps.split_whitespace().collect()),
        None => (Vec::new(), Vec::new()),
    }
}

/// The request of a recording for this world.
async fn request(world: &mut World, recording: &Recording, parts: &[&str]) -> Vec<u8> {
    let references = recording.references();
    let mut replacements = Vec::new();
    for (index, reference) in references.iter().enumerate() {
        let part = parts.get(index).copied().unwrap_or(if index == 0 { "session" } else { "=" });
        if part != "=" {
            replacements.push((reference.clone(), world.role(part).await));
        }
    }
    if recording.stem.ends_with("by-uuid-with-task") {
        let uuid = recording.request_head[0].split("vdi=").nth(1).unwrap().split('&').next().unwrap().to_owned();
        replacements.push((uuid, world.pool.vms()[0].disks[0].vdi.clone()));
    }
    if recording.stem.starts_with("event.from.") && !recording.stem.ends_with("bad-token") {
        replacements.extend(token(world, recording).await);
    }
    let start = &recording.request_head[0];
    // The recorded VM and SR have other uuids.
    for mark in ["/export?uuid=", "/export_metadata?uuid=", "&sr_uuid="] {
        if let Some((_, rest)) = start.split_once(mark).filter(|_| !recording.stem.contains("unknown")) {
            let uuid = match mark {
                "&sr_uuid=" => world.pool.srs()[0].uuid.clone(),
                _ => world.pool.vms()[0].uuid.clone(),
            };
            replacements.push((rest.chars().take(36).collect(), uuid));
        }
    }
    if start.starts_with("PUT /import?") && recording.request_body.starts_with("[binary body") {
        let cut = recording.stem.contains("truncated").then_some(30_000);
        let mut body = archive(world).await;
        body.truncate(cut.unwrap_or(body.len()));
        return recording.request(&replacements, Some(&body));
    }
    let body = match described_length(&recording.request_body) {
        Some(length) if recording.request_head[0].contains("format=vhd") => Some(vhd(world, length).await),
        Some(length) => Some(vec![0; length]),
        None => None,
    };
    recording.request(&replacements, body.as_deref())
}

/// Tokens of the recorded server mean nothing here: the present one takes their place, and a change follows it where
/// one was recorded.
async fn token(world: &mut World, recording: &Recording) -> Option<(String, String)> {
    let at = recording.request_body.find("0000000000")?;
    let recorded = recording.request_body[at..].chars().take(41).collect::<String>();
    if recorded.starts_with("00000000000000000000") {
        return None;
    }
    let (vm, snapshot) = (world.role("vm").await, world.role("snap").await);
    let batch = world.client.ok("event.from", &[json!(["*"]), json!(""), json!(0.0)]).await;
    let token = batch["token"].as_str().unwrap().to_owned();
    if recording.stem.ends_with("incremental-mod") {
        world.client.ok("VM.set_name_description", &[json!(vm), json!("changed")]).await;
    }
    if recording.stem.ends_with("del-events") {
        world.client.ok("VM.destroy", &[json!(snapshot)]).await;
    }
    Some((recorded, token))
}

/// An archive of the world's VM: its records name other hosts and networks than the recorded ones, so its length differs.
async fn archive(world: &World) -> Vec<u8> {
    let vm = &world.pool.vms()[0].uuid;
    let get = format!("GET /export?uuid={vm}&session_id={} HTTP/1.1\r\n\r\n", world.client.session);
    exchange(&world.client.url, get.as_bytes()).await.body
}

/// Sends a request whose body ends too early, half-closes, and reads the answer.
async fn half_closed(world: &World, request: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(world.client.url.strip_prefix("http://").unwrap()).await.unwrap();
    stream.write_all(request).await.unwrap();
    stream.shutdown().await.unwrap();
    wire::read_answer(&mut stream).await
}

/// Whether the client of a recording sent less than the server waited for.
fn unfinished(stem: &str) -> bool {
    stem.starts_with("http.import.xva-truncated") || stem.starts_with("http.import.no-content-length")
}

/// A VHD of the recorded length.
async fn vhd(world: &World, length: usize) -> Vec<u8> {
    let disk = &world.pool.vms()[0].disks[0].vdi;
    let get = format!("GET /export_raw_vdi?vdi={disk}&format=vhd&session_id={} HTTP/1.1\r\n\r\n", world.client.session);
    let body = exchange(&world.client.url, get.as_bytes()).await.body;
    assert_eq!(body.len(), length, "the world's disk has as many blocks as the recorded one");
    body
}

async fn play(recording: &Recording) -> Answer {
    if let Some(story) = transfer_story(recording).await {
        return story;
    }
    let stem = recording.stem.strip_suffix(".task-afterwards").unwrap_or(&recording.stem);
    let (parts, steps) = case(&recording.name, stem);
    let mut world = World::new(&steps).await;
    if stem != recording.stem {
        return task_afterwards(&mut world, recording, stem).await;
    }
    let url = match steps.contains(&"member") {
        true => world.pool.hosts()[1].url.clone(),
        false => world.client.url.clone(),
    };
    let request = request(&mut world, recording, &parts).await;
    if unfinished(&recording.stem) {
        return half_closed(&world, &request).await;
    }
    exchange(&url, &request).await
}

/// The transfer that came before, then what the recording asks about its task.
async fn task_afterwards(world: &mut World, recording: &Recording, stem: &str) -> Answer {
    let before = Recording::read(&folder_of(recording).join(format!("{stem}.txt")));
    let (parts, _) = case("", stem);
    let first = request(world, &before, &parts).await;
    if unfinished(stem) {
        half_closed(world, &first).await;
    } else {
        exchange(&world.client.url, &first).await;
    }
    let task = world.role("task").await;
    world.client.wait(&task).await;
    let second = request(world, recording, &["session", "task"]).await;
    exchange(&world.client.url, &second).await
}

/// Recordings of what happened while a transfer ran or after its client had gone.
async fn transfer_story(recording: &Recording) -> Option<Answer> {
    let import = recording.stem.contains("import") && !recording.stem.contains("export");
    let gone = recording.stem.contains("client-disconnected");
    let during = matches!(
        recording.stem.as_str(),
        "http.import_raw_vdi.upload-in-progress.task"
            | "http.import_raw_vdi.task-cancelled.task-afterwards"
            | "task.cancel.running-import"
    );
    if !gone && !during {
        return None;
    }
    let mut world = World::new(&[]).await;
    let (vdi, task) = (world.role("plain").await, world.role("task").await);
    let (method, length) = if import { ("PUT", DISK) } else { ("GET", 0) };
    let path = if import { "import_raw_vdi" } else { "export_raw_vdi" };
    let head = format!(
        "{method} /{path}?vdi={vdi}&format=raw&session_id={}&task_id={task} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n",
        world.client.session
    );
    let address = world.client.url.strip_prefix("http://").unwrap().to_owned();
    let mut stream = TcpStream::connect(&address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    if import {
        stream.write_all(&vec![1; 65536]).await.unwrap();
    }
    if gone {
        // A reset, so that a sender notices it too.
        socket_without_linger(&stream);
        drop(stream);
        world.client.wait(&task).await;
        let ask = request(&mut world, recording, &["session", "task"]).await;
        return Some(exchange(&world.client.url, &ask).await);
    }
    if recording.stem.contains("task-cancelled") {
        world.client.ok("task.cancel", &[json!(task)]).await;
    }
    let ask = request(&mut world, recording, &["session", "task"]).await;
    let answer = exchange(&world.client.url, &ask).await;
    drop(stream);
    Some(answer)
}

/// Plays a recording without an answer: what is wrong with the simulator's silence.
async fn silence(recording: &Recording) -> Option<String> {
    let (parts, steps) = case(&recording.name, &recording.stem);
    let mut world = World::new(&steps).await;
    let request = request(&mut world, recording, &parts).await;
    if steps.contains(&"starting") {
        let pool = world.pool.clone();
        let mut restart = std::pin::pin!(pool.restart_toolstack(0, std::time::Duration::from_secs(3600)));
        // The toolstack ends in the first step and starts in the last.
        assert!(futures::poll!(restart.as_mut()).is_pending());
        let answer = exchange(&world.client.url, &request).await;
        return (!answer.start.is_empty()).then(|| format!("answers {}", answer.start));
    }
    assert!(steps.contains(&"mute-member"), "{} has no case", recording.name);
    world.pool.stop_host(0).await.unwrap();
    let member = world.pool.hosts()[1].url.clone();
    let mut stream = TcpStream::connect(member.strip_prefix("http://").unwrap()).await.unwrap();
    stream.write_all(&request).await.unwrap();
    let heard = tokio::time::timeout(std::time::Duration::from_secs(1), wire::read_answer(&mut stream)).await;
    if let Ok(answer) = heard {
        return Some(format!("answers {:?}", answer.start));
    }
    // It had been waiting for its coordinator, not working.
    world.pool.start_host(0).await.unwrap();
    let answer = wire::read_answer(&mut stream).await;
    answer.start.is_empty().then(|| "says nothing with a coordinator either".to_owned())
}

fn socket_without_linger(stream: &TcpStream) {
    #[expect(deprecated, reason = "with a time of zero it does not block")]
    stream.set_linger(Some(std::time::Duration::ZERO)).unwrap();
}

fn folder_of(recording: &Recording) -> PathBuf {
    match shared::shared("xapi-wire") {
        Some(folder) => folder,
        None => panic!("{} is not one of our own fixtures", recording.name),
    }
}

async fn check(files: Vec<PathBuf>) {
    let mut wrong = Vec::new();
    let mut compared = 0;
    for path in files {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if LEFT_OUT.iter().any(|(left, _)| name.starts_with(left)) {
            continue;
        }
        let recording = Recording::read(&path);
        if recording.is_silent() {
            compared += 1;
            wrong.extend(silence(&recording).await.map(|text| format!("{name}: {text}")));
            continue;
        }
        let Some(mut expected) = recording.answer() else {
            wrong.push(format!("{name}: without an answer, but not left out"));
            continue;
        };
        if name == "http.pool-xmldbdump.txt" {
            // Up to the number of changes: what follows are the objects of another pool.
            let text = expected.text();
            let mark = "key=\"generation_count\" value=\"";
            let end = text.find(mark).unwrap() + mark.len();
            expected.body = format!("{}[cut here]", &text[..end]).into_bytes();
        }
        let actual = play(&recording).await;
        compared += 1;
        // Bitmaps and encodings of numbers must be equal to the letter.
        let exact = recording.stem.starts_with("VDI.list_changed_blocks") || recording.stem.contains("int-encoding");
        if recording.name.starts_with("http.export.") || recording.name.starts_with("http.export_metadata") {
            // The records name other hosts, networks and times than the recorded ones: the archive's beginning, not
            // its length, can be the same. (Layout and content are the business of the test of archives.)
            if expected.text().starts_with("[binary body") {
                wrong.extend(head_differences(&expected, &actual).into_iter().map(|text| format!("{name}: {text}")));
                continue;
            }
        }
        wrong.extend(differences(&expected, &actual, exact).into_iter().map(|text| format!("{name}: {text}")));
    }
    assert!(wrong.is_empty(), "{} differences in {compared} recordings:\n{}", wrong.len(), wrong.join("\n"));
    println!("{compared} recordings compared");
}

/// Status, headers, and the first bytes of a body of which the recording has the first 64 in hexadecimal: all of them
/// for a tar, the compressor's own header for the others.
fn head_differences(expected: &Answer, actual: &Answer) -> Vec<String> {
    let text = expected.text();
    let hex = text.split("in hex: ").nth(1).unwrap().trim_end_matches(']').to_owned();
    let length = match &hex[..4] {
        "1f8b" => 10,
        "28b5" => 5,
        _ => 64,
    };
    let got: String = actual.body.iter().take(length).map(|byte| format!("{byte:02x}")).collect();
    let only_head = |answer: &Answer| Answer {
        start: answer.start.clone(),
        headers: answer.headers.iter().filter(|(name, _)| name != "content-type").cloned().collect(),
        body: Vec::new(),
    };
    let mut found = differences(&only_head(expected), &only_head(actual), false);
    if got != hex[..2 * length] {
        found.push(format!("begins {got} instead of {}", &hex[..2 * length]));
    }
    if expected.header("content-type") != actual.header("content-type") {
        found.push("another content-type".to_owned());
    }
    found
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answers_are_those_of_a_real_server() {
    let Some(folder) = shared::shared("xapi-wire") else { return };
    let files = files_in(&folder);
    let unused = |(stem, ..): &&(&str, &str, &str)| {
        !files.iter().any(|path| path.ends_with(stem) || Recording::read_stem(path) == *stem)
    };
    let unused: Vec<_> = CASES.iter().filter(unused).map(|(stem, ..)| stem).collect();
    assert!(unused.is_empty(), "cases without a recording: {unused:?}");
    check(files).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_fixtures_hold_without_the_recordings() {
    check(files_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/wire"))).await;
}

#[test]
fn an_answer_in_bytes_is_read() {
    let answer = answer_of(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nbody").unwrap();
    assert_eq!((answer.header("a"), answer.text().as_str()), (Some("b"), "body"));
}
