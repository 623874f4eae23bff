// The object `g` of a generated WebGPU program: records commands, so that everything between two readbacks is one submit, and a
// program without readbacks is recorded once for each set of shapes.

import { InputError, KernelError } from "./errors.js";

const ROUNDS = 1e6; // of all loops of a call
const LOOP_LIMIT = 65535; // rounds in a thread
const SLOT = 256; // alignment of uniforms
const CHUNK = 64 * SLOT;
const GROUPS = 4096; // bind groups kept
const UNIFORM = 64;
const COPY_SRC = 4;
const COPY_DST = 8;
const MAP_READ = 1;
const up4 = (n) => Math.max(4, Math.ceil(n / 4) * 4);

const READERS = {
  bool: (v, o) => v.getUint8(o),
  u8: (v, o) => v.getUint8(o),
  i8: (v, o) => v.getInt8(o),
  u16: (v, o) => v.getUint16(o, true),
  i16: (v, o) => v.getInt16(o, true),
  u32: (v, o) => v.getUint32(o, true),
  i32: (v, o) => v.getInt32(o, true),
  u64: (v, o) => Number(v.getBigUint64(o, true)),
  i64: (v, o) => Number(v.getBigInt64(o, true)),
  f32: (v, o) => v.getFloat32(o, true),
  f64: (v, o) => v.getFloat64(o, true),
};
const WRITERS = {
  bool: (v, o, x) => v.setUint8(o, x ? 1 : 0),
  u8: (v, o, x) => v.setUint8(o, x),
  i8: (v, o, x) => v.setInt8(o, x),
  u16: (v, o, x) => v.setUint16(o, x, true),
  i16: (v, o, x) => v.setInt16(o, x, true),
  u32: (v, o, x) => v.setUint32(o, x, true),
  i32: (v, o, x) => v.setInt32(o, x, true),
  u64: (v, o, x) => v.setBigUint64(o, BigInt(x), true),
  i64: (v, o, x) => v.setBigInt64(o, BigInt(x), true),
  f32: (v, o, x) => v.setFloat32(o, x, true),
  f64: (v, o, x) => v.setFloat64(o, x, true),
};
const WIDTHS = { bool: 1, u8: 1, i8: 1, u16: 2, i16: 2, u32: 4, i32: 4, u64: 8, i64: 8, f32: 4, f64: 8 };

export class Recorder {
  constructor(engine, program) {
    this.engine = engine;
    this.device = engine.device;
    this.program = program;
    this.temporaries = [];
    this.inputs = [];
    this.groups = new Map();
    this.spare = []; // staging buffers for outputs
    this.taken = null; // the one that is in use
    this.uniforms = []; // chunks that calls of a program with readbacks share
    this.garbage = [];
    this.ids = new WeakMap();
    this.count = 0;
    this.float = new Float32Array(1);
    this.word = new Int32Array(this.float.buffer);
  }

  // ------------------------------------------------------------ one call

  begin(ins) {
    this.ins = ins;
    this.commands = [];
    this.sent = 0; // commands that are submitted
    this.outputs = [];
    this.dispatches = 0;
    this.turns = 0; // of loops of the host
    this.replayable = this.program.fixed;
    this.garbage = [];
    this.slots = new Map(); // contents of uniforms -> where they lie
    this.next = 0;
    if (this.program.fixed) this.uniforms = []; // those of an earlier plan belong to it
  }

  setInput(j, bytes) {
    const old = this.inputs[j];
    if (!old || old.size < up4(bytes.length)) {
      if (old) this.drop(old);
      this.inputs[j] = this.engine.allocate(bytes.length, `input ${j}`);
    }
    let data = bytes;
    if (data.length % 4 || data.length === 0) {
      data = new Uint8Array(up4(bytes.length));
      data.set(bytes);
    }
    this.device.queue.writeBuffer(this.inputs[j].buffer, 0, data.buffer, data.byteOffset, data.length);
  }

  /** A buffer that commands may refer to goes away: so do the commands. */
  drop(handle) {
    if (this.commands.length) this.replayable = false;
    this.flush();
    handle.buffer.destroy();
    this.groups.clear();
    this.engine.plans.clear();
  }

  /** Frees the buffers of inputs, temporaries, outputs and uniforms; nothing may be called afterwards. */
  discard() {
    const handles = [...this.inputs, ...this.temporaries, ...this.uniforms].filter(Boolean);
    for (const buffer of [...handles.map((h) => h.buffer), ...this.spare, ...this.garbage, this.taken]) if (buffer) buffer.destroy();
  }

  plan() {
    const { commands, outputs, dispatches, sent, garbage, replayable } = this;
    return { commands, outputs, dispatches, sent, garbage, replayable };
  }

  /** Submits the commands of `plan` that are left, with the copies [output, buffer, offset, bytes] behind them. */
  finish(plan, copies) {
    this.writeUniforms();
    const encoder = this.device.createCommandEncoder();
    this.encode(encoder, plan.commands.slice(plan.sent));
    for (const [output, to, at, bytes] of copies) {
      encoder.copyBufferToBuffer(output.handle.buffer, output.offset, to, at, Math.min(bytes, output.handle.size - output.offset));
    }
    this.device.queue.submit([encoder.finish()]);
    plan.sent = 0;
    if (!plan.replayable) for (const buffer of plan.garbage) buffer.destroy();
  }

  encode(encoder, commands) {
    let pass = null;
    let current = null;
    for (const c of commands) {
      if (c.pipeline) {
        pass = pass || encoder.beginComputePass();
        if (current !== c.pipeline) pass.setPipeline((current = c.pipeline));
        pass.setBindGroup(0, c.group);
        pass.dispatchWorkgroups(c.x, c.y, c.z);
      } else {
        if (pass) pass.end();
        pass = current = null;
        encoder.copyBufferToBuffer(c.from, c.fromOffset, c.to, c.toOffset, c.bytes);
      }
    }
    if (pass) pass.end();
  }

  flush(extra) {
    if (this.sent === this.commands.length && !extra) return;
    this.writeUniforms();
    const encoder = this.device.createCommandEncoder();
    this.encode(encoder, this.commands.slice(this.sent));
    if (extra) extra(encoder);
    this.device.queue.submit([encoder.finish()]);
    this.sent = this.commands.length;
  }

  writeUniforms() {
    for (const chunk of this.uniforms) {
      if (chunk.hi > chunk.lo) this.device.queue.writeBuffer(chunk.buffer, chunk.lo, chunk.data.buffer, chunk.lo, chunk.hi - chunk.lo);
      chunk.lo = chunk.hi;
    }
  }

  staging(bytes) {
    const k = this.spare.findIndex((b) => b.size >= bytes && b.size <= 2 * bytes + 4096);
    this.taken = k >= 0 ? this.spare.splice(k, 1)[0] : this.engine.create({ size: bytes, usage: MAP_READ | COPY_DST }, "the outputs");
    return this.taken;
  }

  release(buffer) {
    this.taken = null;
    this.spare.push(buffer);
    if (this.spare.length > 4) this.spare.shift().destroy();
  }

  // ------------------------------------------------------------ what programs call

  dim(j, axis) {
    return this.ins[j].shape[axis];
  }

  check(got, want, what) {
    if (got !== want) throw new InputError("WRONG_SHAPE", `${what} is ${got}, the model needs ${want} here`, "change the inputs", { got, want });
  }

  peek(j, k) {
    return Number(this.ins[j].data[k]);
  }

  /** Before a dispatch: `n` rounds of loops in one thread, which some adapters do not run to their end. */
  rounds(n, what) {
    if (n > LOOP_LIMIT && this.engine.endsLoops) {
      throw new KernelError("LONG_LOOP", `${what} takes ${n} rounds in one thread, this adapter ends a thread after ${LOOP_LIMIT}`, "use smaller inputs, another GPU, or the package compiled for wasm", { what, rounds: n });
    }
  }

  input(j) {
    return this.inputs[j];
  }

  weights(k) {
    return this.engine.weights[k];
  }

  buffer(k, bytes) {
    const old = this.temporaries[k];
    if (old && old.size >= bytes) return old;
    if (old) this.drop(old);
    return (this.temporaries[k] = this.engine.allocate(bytes, "a temporary"));
  }

  bits(v) {
    this.float[0] = v;
    return this.word[0];
  }

  id(handle) {
    if (!this.ids.has(handle)) this.ids.set(handle, ++this.count);
    return this.ids.get(handle);
  }

  /** Where a dispatch's uniforms lie: {buffer, offset}; equal ones share a place. */
  slot(values) {
    const key = values.join();
    const have = this.slots.get(key);
    if (have) return have;
    const per = Math.ceil((4 * values.length) / SLOT) * SLOT;
    let k = Math.floor(this.next / CHUNK);
    if (this.next % CHUNK && (this.next % CHUNK) + per > CHUNK) this.next = ++k * CHUNK;
    if (k === this.uniforms.length) {
      this.uniforms.push({ buffer: this.engine.create({ size: CHUNK, usage: UNIFORM | COPY_DST }, "uniforms"), data: new Int32Array(CHUNK / 4), lo: 0, hi: 0 });
    }
    const chunk = this.uniforms[k];
    const offset = this.next % CHUNK;
    if (offset === 0) chunk.lo = 0;
    chunk.data.set(values, offset / 4);
    chunk.hi = offset + per;
    this.next += per;
    const place = { buffer: chunk.buffer, offset, id: `${k}.${offset}` };
    this.slots.set(key, place);
    return place;
  }

  dispatch(p, bindings, values, x, y, z) {
    if (!x || !y || !z) return;
    const { pipeline, group: layout } = this.engine.compiled[p];
    const { uniforms } = this.program.pipelines[p];
    const most = this.device.limits.maxStorageBufferBindingSize;
    const large = bindings.find(([, , bytes]) => bytes > most);
    if (large) throw this.engine.noMemory("the run", `it needs ${large[2]} bytes in one binding, the adapter allows ${most}`);
    const place = uniforms ? this.slot(values) : null;
    const key = `${p}|${bindings.map(([h, o, n]) => `${this.id(h)}.${o}.${n}`).join("|")}|${place ? place.id : ""}`;
    let group = this.program.fixed ? undefined : this.groups.get(key);
    if (!group) {
      const entries = bindings.map(([h, offset, size], binding) => ({ binding, resource: { buffer: h.buffer, offset, size: up4(size) } }));
      if (place) entries.push({ binding: bindings.length, resource: { buffer: place.buffer, offset: place.offset, size: uniforms } });
      group = this.device.createBindGroup({ layout, entries });
      if (!this.program.fixed) {
        if (this.groups.size >= GROUPS) this.groups.clear();
        this.groups.set(key, group);
      }
    }
    this.dispatches++;
    this.commands.push({ pipeline, group, x, y, z });
  }

  /** Values of the host into a buffer, in order with the commands around it. */
  write(handle, offset, type, values) {
    const bytes = new Uint8Array(WIDTHS[type] * values.length);
    const view = new DataView(bytes.buffer);
    values.forEach((v, i) => WRITERS[type](view, i * WIDTHS[type], v));
    const size = up4(bytes.length);
    const buffer = this.engine.create({ size, usage: COPY_SRC, mappedAtCreation: true }, "values of the host");
    new Uint8Array(buffer.getMappedRange()).set(bytes);
    buffer.unmap();
    this.garbage.push(buffer);
    this.commands.push({ from: buffer, fromOffset: 0, to: handle.buffer, toOffset: offset, bytes: size });
  }

  copy(from, fromOffset, to, toOffset, bytes) {
    if (bytes > 0) this.commands.push({ from: from.buffer, fromOffset, to: to.buffer, toOffset, bytes });
  }

  /** A round of a loop: the page may do something else once in a while. */
  async round() {
    if (++this.turns > ROUNDS) throw new KernelError("ENDLESS_LOOP", `a loop of the model ran for more than ${ROUNDS} rounds`, "see whether the inputs make sense");
  }

  async read(handle, offset, type) {
    const start = Math.floor(offset / 4) * 4;
    const size = up4(offset + WIDTHS[type] - start);
    const staging = this.staging(16);
    this.flush((encoder) => encoder.copyBufferToBuffer(handle.buffer, start, staging, 0, size));
    await staging.mapAsync(1);
    const value = READERS[type](new DataView(staging.getMappedRange()), offset - start);
    staging.unmap();
    this.release(staging);
    return value;
  }

  output(j, handle, offset, shape) {
    this.outputs[j] = { handle, offset, shape: shape.map(Number) };
  }
}

