// A backup's life with the npm package `xen-api`, the client of Xen Orchestra.
//
// Reads one JSON object from standard input: what the simulator told, plus "modules", the folder that the package is
// installed in, and "transport". The certificate comes by NODE_EXTRA_CA_CERTS. Prints one JSON object with what it saw,
// for the caller to compare with what the simulator's control interface says. Any surprise is an exception.

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { pathToFileURL } from 'node:url'

const given = JSON.parse(readFileSync(0, 'utf8'))
const { Xapi } = await import(pathToFileURL(`${given.modules}/xen-api/index.mjs`))
const BLOCK = 65536

const control = async (method, path, body) => {
  const answer = await fetch(given.control_url.replace(/\/$/, '') + path, { method, body })
  assert.ok(answer.ok, `${method} ${path}: ${answer.status}`)
}

const sha256 = async body => {
  const digest = createHash('sha256')
  let length = 0
  for await (const piece of body) {
    digest.update(piece)
    length += piece.length
  }
  return [digest.digest('hex'), length]
}

const options = { url: given.url, transport: given.transport, allowUnauthorized: false, debounce: 10 }
const wrong = new Xapi({ ...options, auth: { user: given.user, password: 'wrong' }, watchEvents: false })
await assert.rejects(wrong.connect(), { code: 'SESSION_AUTHENTICATION_FAILED' })

const xapi = new Xapi({ ...options, auth: { user: given.user, password: given.password } })
await xapi.connect()
// The package loads every class that `system.listMethods` says can be listed, then follows events of all of them.
await xapi.objectsFetched
const seen = {}
const all = Object.values(xapi.objects.indexes.type.VM)
seen.vms = all.filter(vm => !vm.is_control_domain && !vm.is_a_template).map(vm => vm.uuid).sort()
assert.equal(xapi.pool.$master.uuid, given.hosts[0].uuid)

const vm = xapi.getObjectByUuid(given.vms[0].uuid)
const uuid = vm.uuid
await vm.set_name_description('described by a foreign client')
await xapi.barrier()
assert.equal(xapi.getObjectByUuid(uuid).name_description, 'described by a foreign client')
await vm.set_name_description('')
await vm.update_other_config('foreign', 'one')
await vm.update_other_config('foreign', 'two')
assert.equal((await xapi.barrier(vm.$ref)).other_config.foreign, 'two')
await vm.update_other_config('foreign', null)
await assert.rejects(xapi.call('VM.get_record', 'OpaqueRef:none'), { code: 'HANDLE_INVALID' })

const diskOf = async ref => {
  await xapi.barrier()
  const devices = xapi.getObjectByRef(ref).$VBDs
  return devices.find(device => device.type === 'Disk' && device.userdevice === '0').$VDI
}
const disk = await diskOf(vm.$ref)
const size = Number(disk.virtual_size)
await xapi.callAsync('VDI.enable_cbt', disk.$ref)
const first = await xapi.callAsync('VM.snapshot', vm.$ref, 'first of a foreign client')
const blocks = [1, 2, 40, size / BLOCK - 2]
for (const block of blocks) {
  await control('PUT', `/vms/${uuid}/disks/0?offset=${block * BLOCK}`, Buffer.alloc(700, given.transport))
}
const second = await xapi.callAsync('VM.snapshot', vm.$ref, 'second of a foreign client')
const [older, newer] = [await diskOf(first), await diskOf(second)]
assert.equal(newer.$snapshot_of.uuid, disk.uuid)
const bitmap = Buffer.from(await xapi.callAsync('VDI.list_changed_blocks', older.$ref, newer.$ref), 'base64')
const changed = Array.from({ length: size / BLOCK }, (_, n) => n).filter(n => bitmap[n >> 3] & (0x80 >> (n & 7)))
assert.deepEqual(changed, blocks)

for (const [name, vdi] of [['older_sha256', older], ['newer_sha256', newer]]) {
  const answer = await xapi.getResource('/export_raw_vdi/', { query: { format: 'raw', vdi: vdi.$ref }, task: true })
  const [digest, length] = await sha256(answer.body)
  assert.equal(length, size)
  await answer.task
  seen[name] = digest
}
// Back onto a disk of its own, and out again.
const content = Buffer.concat([Buffer.alloc(BLOCK, 'restored'), Buffer.alloc(size - BLOCK)])
const target = await xapi.callAsync('VDI.create', {
  name_description: '', name_label: 'restored by a foreign client', other_config: {}, read_only: false,
  sharable: false, SR: disk.SR, tags: [], type: 'user', virtual_size: size, xenstore_data: {}, sm_config: {},
})
const query = { format: 'raw', vdi: target }
await xapi.putResource(content, '/import_raw_vdi/', { query, task: xapi.createTask('import of a foreign client') })
const answer = await xapi.getResource('/export_raw_vdi/', { query })
const [digest] = await sha256(answer.body)
assert.equal(digest, createHash('sha256').update(content).digest('hex'))
await answer.task

const addresses = await xapi.call('VDI.get_nbd_info', newer.$ref)
assert.ok(addresses.length > 0 && addresses[0].cert.includes('BEGIN CERTIFICATE'))

await xapi.callAsync('VDI.destroy', target)
await xapi.callAsync('VM.destroy', first)
await xapi.callAsync('VDI.data_destroy', older.$ref)
await xapi.barrier()
assert.equal(xapi.getObjectByRef(older.$ref).type, 'cbt_metadata')
await xapi.callAsync('VM.destroy', second)
for (const vdi of [older, newer]) {
  await xapi.callAsync('VDI.destroy', vdi.$ref)
}
await xapi.callAsync('VDI.disable_cbt', disk.$ref)
await xapi.barrier()
assert.equal(xapi.getObjectByRef(newer.$ref, null), null)
// The package destroys its tasks in the background: wait until the last is gone, for whoever looks for leaks.
while (Object.keys(await xapi.call('task.get_all_records')).length > 0) {
  await xapi.barrier()
}
const session = xapi.sessionId
await xapi.disconnect()
// Its logout is in the background too.
const gone = new URL('/export_raw_vdi', given.url)
gone.search = new URLSearchParams({ session_id: session, vdi: disk.$ref })
while ((await fetch(gone, { method: 'GET' }).then(async a => (await a.body.cancel(), a.status))) !== 401) {}
process.stdout.write(JSON.stringify(seen) + '\n', () => process.exit(0))
