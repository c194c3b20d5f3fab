//! `curl` against the simulated hosts' HTTP handlers, in another process: disks go out and come in, and others judge
//! what came (`sha256sum`, `qemu-img`, `tar`). Statuses and manners are those of the recordings of a real xapi.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test ends with a panic, and its helpers too")]

mod curl_support;

use curl_support::{Answer, Stage, sha256sum, told};
use serde_json::{Value, json};
use std::process::Command;

const MIB: u64 = 1 << 20;
/// Size of the disk that the simulator makes.
const DISK_BYTES: u64 = 64 * MIB;

/// A file of `length` bytes: blocks of data, blocks of zeros, and a last sector that is neither.
fn image(stage: &Stage, name: &str, length: u64) -> std::path::PathBuf {
    let mut bytes = vec![0_u8; usize::try_from(length).unwrap()];
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for (index, block) in bytes.chunks_mut(1 << 20).enumerate() {
        if index % 3 == 0 {
            for byte in block {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                *byte = state.to_be_bytes()[0];
            }
        }
    }
    bytes.splice(bytes.len() - 512.., [0x5a; 512]);
    stage.save(name, &bytes)
}

/// What qemu-img makes of a VHD stream. xapi's creator is not known to it, so that the size has to be told.
fn vhd_to_raw(stage: &Stage, vhd: &std::path::Path) -> std::path::PathBuf {
    let raw = stage.path("from-vhd.raw");
    let source = format!("driver=vpc,force_size_calc=current_size,file.filename={}", vhd.display());
    let mut command = Command::new("qemu-img");
    told(command.args(["convert", "--image-opts", &source, "-O", "raw"]).arg(&raw));
    raw
}

#[test]
fn a_disk_comes_out_raw_the_same_with_every_way_to_log_in() {
    let stage = Stage::new(&[]);
    let expected = stage.disk_sha256();
    let path = format!("/export_raw_vdi?format=raw&vdi={}", stage.vdi);
    let with_session = format!("{path}&session_id={}", stage.session);
    let user = format!("{}:{}", stage.user, stage.password);
    let cookie = format!("session_id={}", stage.session);
    let ways: [(&str, &[&str]); 4] = [
        (&with_session, &[]),
        (&path, &["--user", &user]),
        (&path, &["--cookie", &cookie]),
        // Ranges are not known: the whole disk comes, as if nobody had asked.
        (&with_session, &["--range", "0-511"]),
    ];
    for (path, more) in ways {
        let answer = stage.get(path, more);
        assert_eq!((answer.status, answer.version.as_str()), (200, "1.1"), "{more:?}");
        assert_eq!(sha256sum(&answer.body), expected, "{more:?}");
        assert_eq!(answer.header("content-type"), Some("application/octet-stream"));
        assert_eq!(answer.header("connection"), Some("close"));
        // The end of the body is the end of the connection, and nothing else.
        assert_eq!((answer.header("content-length"), answer.header("transfer-encoding")), (None, None));
        let name = format!("attachment; filename=\"{}.raw\"", stage.vdi);
        assert_eq!(answer.header("content-disposition"), Some(name.as_str()));
    }
    // By reference, with a task of the client's own.
    let task = stage.task();
    let reference = stage.call("VDI.get_by_uuid", &[json!(stage.vdi)]);
    let reference = reference.as_str().unwrap();
    let answer = stage
        .get(&format!("/export_raw_vdi?format=RAW&vdi={reference}&session_id={}&task_id={task}", stage.session), &[]);
    assert_eq!(sha256sum(&answer.body), expected);
    assert_eq!(answer.header("task-id"), Some(task.as_str()));
    assert_eq!(stage.ended(&task), ("success".to_owned(), json!([])));
    stage.assert_clean();
}

#[test]
fn a_disk_comes_out_as_a_vhd_that_qemu_img_reads() {
    let stage = Stage::new(&[]);
    let task = stage.task();
    let query = format!("vdi={}&session_id={}&task_id={task}", stage.vdi, stage.session);
    let answer = stage.get(&format!("/export_raw_vdi?format=vhd&{query}"), &[]);
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/vhd")));
    assert_eq!(stage.ended(&task).0, "success");
    // Only the 16 MiB that hold data travel, and the tables.
    assert!((16 * MIB..18 * MIB).contains(&std::fs::metadata(&answer.body).unwrap().len()));
    let info = told(Command::new("qemu-img").args(["info", "--output=json", "-f", "vpc"]).arg(&answer.body));
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["format"], "vpc");
    let raw = vhd_to_raw(&stage, &answer.body);
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), DISK_BYTES);
    assert_eq!(sha256sum(&raw), stage.disk_sha256());
    stage.assert_clean();
}

#[test]
fn a_disk_goes_in_raw_and_as_a_vhd_that_qemu_img_wrote() {
    let stage = Stage::new(&[]);
    let raw = image(&stage, "image.raw", 16 * MIB);
    let vhd = stage.path("image.vhd");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "vpc", "-o", "subformat=dynamic,force_size=on"]);
    told(convert.arg(&raw).arg(&vhd));
    for (format, file) in [("raw", &raw), ("vhd", &vhd)] {
        let vdi = stage.new_vdi(16 * MIB);
        let task = stage.task();
        let path = format!("/import_raw_vdi?format={format}&vdi={vdi}&session_id={}&task_id={task}", stage.session);
        let answer = stage.put(&path, file, &[]);
        assert_eq!((answer.status, answer.text().as_str()), (200, ""), "{format}");
        assert_eq!(answer.header("task-id"), Some(task.as_str()));
        assert_eq!(stage.ended(&task), ("success".to_owned(), json!([])), "{format}");
        let result = stage.call("task.get_result", &[json!(task)]);
        assert_eq!(result, json!(format!("<value>{vdi}</value>")));
        assert_eq!(sha256sum(&stage.export(&vdi)), sha256sum(&raw), "{format}");
    }
    // A short body is taken, and the rest stays as it was.
    let vdi = stage.new_vdi(16 * MIB);
    let short = image(&stage, "short.raw", MIB);
    let path = format!("/import_raw_vdi?vdi={vdi}&session_id={}", stage.session);
    assert_eq!(stage.put(&path, &short, &[]).status, 200);
    let mut expected = std::fs::read(&short).unwrap();
    expected.resize(16 << 20, 0);
    let expected = stage.save("short-and-zeros.raw", &expected);
    assert_eq!(sha256sum(&stage.export(&vdi)), sha256sum(&expected));
    // Without a disk, into an SR: a disk of the length of the body.
    let sr = stage.call("VDI.get_SR", &[json!(vdi)]);
    let task = stage.task();
    let user = format!("{}:{}", stage.user, stage.password);
    let path = format!("/import_raw_vdi?format=raw&sr_id={}&task_id={task}", sr.as_str().unwrap());
    assert_eq!(stage.put(&path, &raw, &["--user", &user]).status, 200);
    let made = stage.call("task.get_result", &[json!(task)]);
    let made = made.as_str().unwrap().trim_start_matches("<value>").trim_end_matches("</value>").to_owned();
    assert_eq!(stage.call("VDI.get_name_label", &[json!(made)]), "Imported VDI");
    assert_eq!(sha256sum(&stage.export(&made)), sha256sum(&raw));
}

#[test]
fn chunks_of_xapis_own_protocol_go_to_their_places() {
    let stage = Stage::new(&[]);
    let raw = image(&stage, "image.raw", 8 * MIB);
    let vdi = stage.new_vdi(8 * MIB);
    let path = format!("/import_raw_vdi?vdi={vdi}&session_id={}", stage.session);
    assert_eq!(stage.put(&path, &raw, &[]).status, 200);

    let mut expected = std::fs::read(&raw).unwrap();
    let mut stream = Vec::new();
    for (offset, length, byte) in [(5 * MIB, 4096_u32, 0x11_u8), (0, 65_536, 0x22), (8 * MIB - 512, 512, 0x33)] {
        let data = vec![byte; usize::try_from(length).unwrap()];
        stream.extend(offset.to_le_bytes());
        stream.extend(length.to_le_bytes());
        stream.extend(&data);
        let start = usize::try_from(offset).unwrap();
        expected.splice(start..start + data.len(), data);
    }
    let cut = stage.save("cut", &stream);
    stream.extend([0; 12]);
    let whole = stage.save("whole", &stream);
    let chunked = |file: &std::path::Path| {
        let task = stage.task();
        let query = format!("format=raw&chunked=true&vdi={vdi}&session_id={}&task_id={task}", stage.session);
        let answer = stage.put(&format!("/import_raw_vdi?{query}"), file, &[]);
        (answer, stage.ended(&task))
    };
    assert_eq!(chunked(&whole).1, ("success".to_owned(), json!([])));
    let expected = stage.save("expected", &expected);
    assert_eq!(sha256sum(&stage.export(&vdi)), sha256sum(&expected));
    // curl keeps the connection open for an answer, as a client does that does not know that its stream is cut: the
    // host waits for the rest. Told to give up, it does, and the task fails.
    let task = stage.task();
    let query = format!("format=raw&chunked=true&vdi={vdi}&session_id={}&task_id={task}", stage.session);
    let given_up = stage.try_put(&format!("/import_raw_vdi?{query}"), &cut, &["--max-time", "10"]);
    assert_eq!(given_up.code, Some(28), "{given_up:?}");
    assert_eq!(stage.ended(&task), ("failure".to_owned(), json!(["VDI_IO_ERROR", "Device I/O errors"])));
}

#[test]
fn who_is_not_logged_in_gets_401_and_what_is_not_there_403() {
    let stage = Stage::new(&[]);
    let export = format!("/export_raw_vdi?format=raw&vdi={}", stage.vdi);
    let import = format!("/import_raw_vdi?format=raw&vdi={}", stage.vdi);
    let wrong = format!("{}:wrong", stage.user);
    let small = stage.save("small", &[0; 512]);
    let before = stage.disk_sha256();
    let refused = |answer: &Answer, realm: &str| {
        assert_eq!((answer.status, answer.header("connection")), (401, Some("close")));
        assert_eq!(answer.header("www-authenticate"), Some(format!("Basic realm=\"{realm}\"").as_str()));
        assert!(answer.text().contains("<h1>HTTP 401 unauthorised</h1>"), "{}", answer.text());
    };
    refused(&stage.get(&export, &[]), "get_export_raw_vdi");
    refused(&stage.get(&format!("{export}&session_id=OpaqueRef:nope"), &[]), "get_export_raw_vdi");
    refused(&stage.get(&export, &["--user", &wrong]), "get_export_raw_vdi");
    refused(&stage.get(&format!("/export?uuid={}", stage.vm), &[]), "get_export");
    refused(&stage.put(&import, &small, &[]), "put_import_raw_vdi");
    let task = stage.task();
    refused(&stage.get(&format!("{export}&session_id=OpaqueRef:nope&task_id={task}"), &[]), "get_export_raw_vdi");
    assert_eq!(stage.ended(&task), ("failure".to_owned(), json!(["SESSION_AUTHENTICATION_FAILED"])));
    assert_eq!(stage.disk_sha256(), before);

    for path in ["/", "/no/such/path", "/jsonrpc"] {
        let answer = stage.get(path, &[]);
        assert_eq!((answer.status, answer.header("connection")), (403, Some("close")), "{path}");
        assert!(answer.text().contains("<h1>HTTP 403 forbidden</h1>"), "{path}");
    }
    stage.assert_clean();
}

#[test]
fn what_can_not_be_done_has_the_recorded_status() {
    let stage = Stage::new(&[]);
    let session = format!("session_id={}", stage.session);
    let vdi = format!("vdi={}", stage.vdi);
    let internal = |text: &str| ("failure".to_owned(), json!(["INTERNAL_ERROR", text]));

    let task = stage.task();
    let answer = stage.get(&format!("/export_raw_vdi?format=qqq&{vdi}&{session}&task_id={task}"), &[]);
    assert_eq!((answer.status, answer.version.as_str(), answer.text().as_str()), (404, "1.0", ""));
    assert_eq!(stage.ended(&task), internal("Unknown format qqq"));

    // An upload of unknown length, which curl sends in HTTP's chunked coding.
    let small = stage.save("small", &[7; 65_536]);
    let before = stage.disk_sha256();
    let task = stage.task();
    let path = format!("/import_raw_vdi?format=raw&{vdi}&{session}&task_id={task}");
    let answer = stage.put(&path, &small, &["--header", "Transfer-Encoding: chunked"]);
    assert_eq!((answer.status, answer.version.as_str()), (404, "1.0"));
    assert_eq!(stage.ended(&task), internal("Cannot handle encoding: chunked"));
    assert_eq!(stage.disk_sha256(), before);

    let nowhere = stage.put(&format!("/import_raw_vdi?format=raw&{session}"), &small, &[]);
    assert_eq!(nowhere.status, 400);
    let sr = stage.call("VDI.get_SR", &[stage.call("VDI.get_by_uuid", &[json!(stage.vdi)])]);
    let into_sr = format!("/import_raw_vdi?format=vhd&sr_id={}&{session}", sr.as_str().unwrap());
    let answer = stage.put(&into_sr, &small, &[]);
    assert_eq!((answer.status, answer.version.as_str()), (400, "1.0"));

    for (path, said) in [
        (format!("/export_raw_vdi?{session}"), "Missing vdi query parameter"),
        (format!("/export_raw_vdi?vdi=OpaqueRef:nope&{session}"), "OpaqueRef:nope"),
        (format!("/export?uuid=00000000-0000-0000-0000-000000000000&{session}"), "UUID_INVALID"),
    ] {
        let answer = stage.get(&path, &[]);
        assert_eq!(answer.status, 500, "{path}");
        assert!(answer.text().contains(said), "{}", answer.text());
    }

    for more in [&["--head"][..], &["--request", "DELETE"]] {
        let answer = stage.get(&format!("/export_raw_vdi?{vdi}&{session}"), more);
        assert_eq!((answer.status, answer.header("connection")), (501, Some("close")), "{more:?}");
    }

    // Start line and headers together: 1006 bytes pass, more do not.
    let long = format!("X-Pad: {}", "a".repeat(1000));
    assert_eq!(stage.get(&format!("/export_raw_vdi?{vdi}&{session}"), &["--header", &long]).status, 431);
    let passes = format!("X-Pad: {}", "a".repeat(500));
    assert_eq!(stage.get("/", &["--header", &passes]).status, 403);
    stage.assert_clean();
}

#[test]
fn a_failure_after_the_200_is_a_second_response_in_the_body() {
    let stage = Stage::new(&[]);
    let session = format!("session_id={}", stage.session);
    let order = json!({
        "call": "http/export_raw_vdi", "effect": "error", "code": "SR_BACKEND_FAILURE_1200", "params": ["", "no tap", ""],
    });
    stage.simulator.control("POST", "/faults", order.to_string().as_bytes()).unwrap();
    let task = stage.task();
    let answer = stage.get(&format!("/export_raw_vdi?vdi={}&{session}&task_id={task}", stage.vdi), &[]);
    assert_eq!(answer.status, 200);
    assert!(answer.text().starts_with("HTTP/1.1 500 Internal Error\r\n"), "{}", answer.text());
    assert!(answer.text().contains("SR_BACKEND_FAILURE_1200: [ ; no tap;  ]"), "{}", answer.text());
    assert_eq!(stage.ended(&task), ("failure".to_owned(), json!(["SR_BACKEND_FAILURE_1200", "", "no tap", ""])));

    let vdi = stage.new_vdi(8 * MIB);
    let garbage = stage.save("garbage", b"garbage!".repeat(512).as_slice());
    let task = stage.task();
    let answer = stage.put(&format!("/import_raw_vdi?format=vhd&vdi={vdi}&{session}&task_id={task}"), &garbage, &[]);
    assert_eq!(answer.status, 200);
    let text = answer.text();
    assert!(text.starts_with("HTTP/1.1 400 Bad Request\r\n") && text.contains("\r\nHTTP/1.1 500 Internal"), "{text}");
    assert_eq!(stage.ended(&task), ("failure".to_owned(), json!(["VDI_IO_ERROR", "Device I/O errors"])));
}

#[test]
fn connections_are_kept_after_calls_and_end_with_transfers() {
    let stage = Stage::new(&[]);
    let call = json!({
        "jsonrpc": "2.0", "id": 1, "method": "pool.get_all", "params": [stage.session],
    });
    let call = stage.save("call", call.to_string().as_bytes());
    let call = format!("@{}", call.display());
    let post = ["--header", "Content-Type: application/json", "--data-binary", &call];
    assert_eq!(stage.connections("/jsonrpc", 3, &post), [1, 0, 0]);
    let export = format!("/export_raw_vdi?vdi={}&session_id={}", stage.vdi, stage.session);
    assert_eq!(stage.connections(&export, 2, &[]), [1, 1]);
    // HTTP/1.0 ends with the answer, and an OPTIONS does not.
    let old: Vec<&str> = post.iter().copied().chain(["--http1.0"]).collect();
    assert_eq!(stage.connections("/jsonrpc", 2, &old), [1, 1]);
    assert_eq!(stage.connections("/", 2, &["--request", "OPTIONS"]), [1, 0]);

    // A call in HTTP's chunked coding is refused; one whose client waits for leave to send is not.
    let chunked: Vec<&str> = post.iter().copied().chain(["--header", "Transfer-Encoding: chunked"]).collect();
    let answer = stage.get("/jsonrpc", &chunked);
    assert_eq!(answer.status, 500);
    assert!(answer.text().contains("We require a content-length: HTTP header"), "{}", answer.text());
    let expecting: Vec<&str> = post.iter().copied().chain(["--header", "Expect: 100-continue"]).collect();
    assert_eq!(stage.get("/jsonrpc", &expecting).status, 200);
    stage.assert_clean();
}

#[test]
fn an_archive_of_a_vm_is_listed_by_tar_and_comes_back() {
    let stage = Stage::new(&[]);
    let session = format!("session_id={}", stage.session);
    let archive = stage.get(&format!("/export?uuid={}&{session}", stage.vm), &[]);
    assert_eq!((archive.status, archive.version.as_str()), (200, "1.0"));
    let archive = archive.keep(&stage, "vm.xva");
    let listed = told(Command::new("tar").arg("-tf").arg(&archive));
    let names: Vec<&str> = listed.lines().collect();
    let (first, last) = (names[1].to_owned(), format!("{}/{:08}", names[1].split('/').next().unwrap(), 63));
    assert_eq!(names[0], "ova.xml");
    assert!(first.starts_with("Ref:") && first.ends_with("/00000000"), "{first}");
    assert_eq!(names[2], format!("{first}.xxhash"));
    // 16 MiB of data, the last chunk of zeros all the same, and a check sum for each.
    assert_eq!(names.len(), 1 + 2 * 17, "{names:?}");
    assert_eq!(names[names.len() - 2], last);
    let chunk = stage.path("chunk");
    let file = std::fs::File::create(&chunk).unwrap();
    assert!(Command::new("tar").arg("-xOf").arg(&archive).arg(&first).stdout(file).status().unwrap().success());
    let mut expected = std::fs::read(stage.disk()).unwrap();
    expected.truncate(1 << 20);
    assert_eq!(sha256sum(&chunk), sha256sum(&stage.save("expected", &expected)));

    let packed = stage.get(&format!("/export?uuid={}&use_compression=true&{session}", stage.vm), &[]);
    assert_eq!(told(Command::new("tar").arg("-tzf").arg(&packed.body)), listed);

    let task = stage.task();
    let answer = stage.put(&format!("/import?{session}&task_id={task}"), &archive, &[]);
    assert_eq!(answer.status, 200);
    assert_eq!(stage.ended(&task).0, "success");
    let vbds = stage.simulator.get_json("/objects/VBD").unwrap();
    let original = stage.call("VDI.get_by_uuid", &[json!(stage.vdi)]);
    let disks = vbds.as_object().unwrap().values().filter(|vbd| vbd["type"] == "Disk" && vbd["VDI"] != original);
    let restored: Vec<&str> = disks.map(|vbd| vbd["VDI"].as_str().unwrap()).collect();
    assert_eq!(restored.len(), 1);
    assert_eq!(sha256sum(&stage.export(restored[0])), stage.disk_sha256());
}

#[test]
fn a_host_that_does_not_see_the_sr_names_another_one_and_curl_follows() {
    let stage = Stage::new(&["--hosts", "3"]);
    let hosts = stage.simulator.ready()["hosts"].as_array().unwrap().clone();
    let sr = stage.call("VDI.get_SR", &[stage.call("VDI.get_by_uuid", &[json!(stage.vdi)])]);
    let pbds = stage.simulator.get_json("/objects/PBD").unwrap();
    for host in &hosts[..2] {
        let host = stage.call("host.get_by_uuid", &[host["uuid"].clone()]);
        let (pbd, _) =
            pbds.as_object().unwrap().iter().find(|(_, pbd)| pbd["SR"] == sr && pbd["host"] == host).unwrap();
        stage.call("PBD.unplug", &[json!(pbd)]);
    }
    let path = format!("/export_raw_vdi?format=raw&vdi={}&session_id={}", stage.vdi, stage.session);
    let answer = stage.get(&path, &[]);
    assert_eq!(answer.status, 302);
    let place = answer.header("location").unwrap();
    assert!(place.starts_with(hosts[2]["url"].as_str().unwrap().trim_end_matches('/')), "{place}");

    // That host shows its own certificate, which the pool vouches for.
    let mut trusted = std::fs::read_to_string(stage.certificate()).unwrap();
    let third = stage.call("host.get_by_uuid", &[hosts[2]["uuid"].clone()]);
    trusted.push_str(stage.call("host.get_server_certificate", &[third]).as_str().unwrap());
    let both = stage.save("both.pem", trusted.as_bytes());
    let refused = stage.try_get(&path, &["--location"]);
    assert_eq!(refused.code, Some(60), "{refused:?}");
    let answer = stage.get(&path, &["--location", "--cacert", both.to_str().unwrap()]);
    assert_eq!(answer.status, 200);
    assert_eq!(sha256sum(&answer.body), stage.disk_sha256());
}
