"""A backup's life with the XenAPI library of the hypervisor's makers, over XML-RPC and verified TLS.

Reads one JSON object from standard input: what the simulator told, plus "certificate", a PEM file to trust. Prints one
JSON object with what it saw, for the caller to compare with what the simulator's control interface says. Any surprise
is an exception.
"""

import base64
import hashlib
import json
import ssl
import sys
import urllib.error
import urllib.request
import xmlrpc.client

import XenAPI

GIVEN = json.load(sys.stdin)
CONTEXT = ssl.create_default_context(cafile=GIVEN["certificate"])
BLOCK = 65536


def connect():
    return XenAPI.Session(GIVEN["url"], transport=xmlrpc.client.SafeTransport(context=CONTEXT))


def refused(call, code):
    """The call must fail with this code; gives its parameters."""
    try:
        call()
    except XenAPI.Failure as failure:
        assert failure.details[0] == code, failure.details
        return failure.details[1:]
    raise AssertionError(f"no {code}")


def control(method, path, data=None):
    request = urllib.request.Request(GIVEN["control_url"].rstrip("/") + path, method=method, data=data)
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def wait(session, task):
    """Waits for a task by its events and gives its result's text."""
    token = ""
    while True:
        # `from` is a keyword of the language, so that the call can not be written as an attribute.
        batch = session.xenapi_request("event.from", (["task/" + task], token, 30.0))
        token = batch["token"]
        for event in batch["events"]:
            assert event["class"] == "task" and event["ref"] == task, event
            record = event["snapshot"]
            if record["status"] != "pending":
                assert record["status"] == "success", record
                session.xenapi.task.destroy(task)
                return record["result"]


def reference_of(result):
    """A task's result is a piece of XML."""
    assert result.startswith("<value>") and result.endswith("</value>"), result
    return result[len("<value>") : -len("</value>")]


def disks_of(session, vm):
    disks = {}
    for vbd in session.xenapi.VM.get_VBDs(vm):
        record = session.xenapi.VBD.get_record(vbd)
        if record["type"] == "Disk":
            disks[record["userdevice"]] = record["VDI"]
    return disks


def export_sha256(session, vdi, form):
    url = f"{GIVEN['url'].rstrip('/')}/export_raw_vdi?session_id={session.handle}&vdi={vdi}&format={form}"
    digest, length, head = hashlib.sha256(), 0, b""
    with urllib.request.urlopen(url, context=CONTEXT) as answer:
        while piece := answer.read(1 << 20):
            head = head or piece[:512]
            digest.update(piece)
            length += len(piece)
    return digest.hexdigest(), length, head


def main():
    seen = {}
    session = connect()
    assert refused(lambda: session.xenapi.login_with_password("root", "wrong", "1.0", "t"), "SESSION_AUTHENTICATION_FAILED")
    assert session.handle is None
    session.xenapi.login_with_password(GIVEN["user"], GIVEN["password"], "1.0", "tests of a foreign client")
    seen["api_version"] = session.API_version
    api = session.xenapi
    handle = session.handle

    # Lists and records; 64-bit integers are texts in XML-RPC, floats and dates have types.
    vms = api.VM.get_all_records()
    seen["vms"] = sorted(r["uuid"] for r in vms.values() if not r["is_control_domain"] and not r["is_a_template"])
    vm = api.VM.get_by_uuid(GIVEN["vms"][0]["uuid"])
    (pool,) = api.pool.get_all()
    assert api.host.get_uuid(api.pool.get_master(pool)) == GIVEN["hosts"][0]["uuid"]
    assert isinstance(api.host.get_servertime(api.pool.get_master(pool)), xmlrpc.client.DateTime)
    assert isinstance(api.VM.get_memory_static_max(vm), str)
    assert refused(lambda: api.VM.get_record("OpaqueRef:none"), "HANDLE_INVALID") == ["VM", "OpaqueRef:none"]
    assert refused(lambda: api.VM.get_by_uuid("none"), "UUID_INVALID") == ["VM", "none"]
    assert refused(lambda: api.VM.no_such_method(vm), "MESSAGE_METHOD_UNKNOWN") == ["VM.no_such_method"]

    # Events: by the old calls and by the new one.
    api.event.register(["VM"])
    api.VM.set_name_description(vm, "described by a foreign client")
    events = api.event.next()
    assert any(e["ref"] == vm and e["operation"] == "mod" for e in events), events
    api.event.unregister(["VM"])
    batch = session.xenapi_request("event.from", (["VM"], "", 10.0))
    assert {e["ref"] for e in batch["events"]} == set(vms) and int(batch["valid_ref_counts"]["vm"]) == len(vms)
    api.VM.set_name_description(vm, "")
    batch = session.xenapi_request("event.from", (["VM"], batch["token"], 10.0))
    assert [(e["ref"], e["snapshot"]["name_description"]) for e in batch["events"]] == [(vm, "")], batch

    # Changed block tracking between two snapshots, one synchronous and one as a task.
    disk = disks_of(session, vm)["0"]
    size = int(api.VDI.get_virtual_size(disk))
    api.VDI.enable_cbt(disk)
    assert api.VDI.get_cbt_enabled(disk) is True
    first = api.VM.snapshot(vm, "first of a foreign client")
    blocks = [0, 3, 17, size // BLOCK - 1]
    for block in blocks:
        control("PUT", f"/vms/{GIVEN['vms'][0]['uuid']}/disks/0?offset={block * BLOCK}", b"changed" * 100)
    second = reference_of(wait(session, session.xenapi_request("Async.VM.snapshot", (vm, "second of a foreign client"))))
    older, newer = disks_of(session, first)["0"], disks_of(session, second)["0"]
    assert api.VDI.get_snapshot_of(newer) == disk and api.VDI.get_is_a_snapshot(newer) is True
    bitmap = base64.b64decode(api.VDI.list_changed_blocks(older, newer))
    assert len(bitmap) == (size // BLOCK + 7) // 8
    assert [n for n in range(size // BLOCK) if bitmap[n // 8] & (0x80 >> n % 8)] == blocks

    # What is exported.
    seen["older_sha256"], length, _ = export_sha256(session, older, "raw")
    seen["newer_sha256"], _, _ = export_sha256(session, newer, "raw")
    assert length == size
    _, length, head = export_sha256(session, newer, "vhd")
    assert head[:8] == b"conectix" and length > 512, head
    infos = api.VDI.get_nbd_info(newer)
    assert infos and infos[0]["exportname"].endswith("?session_id=" + handle), infos
    assert int(infos[0]["port"]) > 0 and "BEGIN CERTIFICATE" in infos[0]["cert"]

    # The data goes, its bitmap stays; then everything goes.
    api.VM.destroy(first)
    api.VDI.data_destroy(older)
    assert api.VDI.get_type(older) == "cbt_metadata"
    assert refused(lambda: api.VDI.get_nbd_info(older), "VDI_INCOMPATIBLE_TYPE")
    bitmap = base64.b64decode(api.VDI.list_changed_blocks(older, newer))
    assert sum(bin(byte).count("1") for byte in bitmap) == len(blocks)
    api.VM.destroy(second)
    for snapshot in (older, newer):
        api.VDI.destroy(snapshot)
    api.VDI.disable_cbt(disk)

    api.session.logout()
    try:
        export_sha256(type("Gone", (), {"handle": handle}), disk, "raw")
        raise AssertionError("a session that is logged out exports")
    except urllib.error.HTTPError as error:
        assert error.code == 401, error
    print(json.dumps(seen))


main()
