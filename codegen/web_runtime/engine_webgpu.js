// Runs a model compiled to WebGPU: device, pipelines, weights, and the object `g` that the generated program calls (docs/web.md).

import * as program from "../program.js";
import { DeviceLostError, InputError, KernelError, LuthierError, OutOfMemoryError, UnsupportedError } from "./errors.js";
import { Recorder } from "./gpu_recorder.js";
import { textOf } from "./platform.js";
import { byteSize, checkInputs, chooseOutputs, Defaults, fromBytes, product, toBytes } from "./tensors.js";

const PLANS = 8; // shapes whose commands are kept
const ENABLE = { "shader-f16": "f16", subgroups: "subgroups" }; // features of a device: the directive that a shader needs to use them
const up4 = (n) => Math.ceil(n / 4) * 4;
const up8 = (n) => Math.ceil(n / 8) * 8;

async function openDevice(options) {
  const gpu = options.gpu || (typeof navigator === "object" && navigator ? navigator.gpu : undefined);
  const hint = "use a browser with WebGPU over https or on localhost, or the package compiled for wasm";
  if (!gpu) throw new UnsupportedError("NO_WEBGPU", "there is no WebGPU here", hint);
  const adapter = await gpu.requestAdapter({ powerPreference: options.powerPreference || "high-performance" });
  if (!adapter) throw new UnsupportedError("NO_ADAPTER", "WebGPU finds no adapter", hint);
  const missing = program.needs.features.filter((f) => !adapter.features.has(f));
  const limits = {};
  for (const [name, value] of Object.entries(program.needs.limits)) {
    const least = name.startsWith("min") && name.endsWith("Alignment");
    if (least ? adapter.limits[name] > value : adapter.limits[name] < value) missing.push(`${name} ${value} (it has ${adapter.limits[name]})`);
    else limits[name] = value;
  }
  if (missing.length) throw new UnsupportedError("GPU_TOO_SMALL", `the adapter lacks ${missing.join(", ")}`, "use another GPU, or the package compiled for wasm", { missing });
  for (const name of ["maxBufferSize", "maxStorageBufferBindingSize"]) limits[name] = adapter.limits[name];
  const language = gpu.wgslLanguageFeatures || new Set();
  const allowed = options.features === undefined ? null : new Set(options.features);
  const on = (f) => (adapter.features.has(f) || language.has(f)) && (!allowed || allowed.has(f));
  const chosen = program.pipelines.map(({ shaders }) => shaders.find((s) => program.features[s].every(on)));
  const wanted = [...new Set(chosen.flatMap((s) => program.features[s]))];
  const requiredFeatures = [...program.needs.features, ...wanted.filter((f) => adapter.features.has(f))];
  const device = await adapter.requestDevice({ requiredFeatures, requiredLimits: limits });
  const { vendor = "", architecture = "", description = "" } = adapter.info || {};
  return { device, chosen, features: wanted, adapter: [vendor, architecture, description].filter(Boolean).join(" ") };
}

/** @implements the engine interface: load, run, close, info, debug. */
export class Engine {
  constructor(manifest, files, options) {
    this.manifest = manifest;
    this.files = files;
    this.options = options;
    this.defaults = new Defaults(manifest.inputs);
    this.info = { backend: "webgpu", adapter: "", features: [], pipelines: program.pipelines.length, restarts: 0, warnings: [] };
  }

  static async load(manifest, files, options, onBytes) {
    const engine = new Engine(manifest, files, options);
    await engine.start(onBytes);
    return engine;
  }

  /** Device, pipelines and weights; pipelines are made while weights arrive. */
  async start(onBytes) {
    const shaders = this.files.checked("shaders.json", this.manifest.files["shaders.json"], onBytes).then(async (b) => JSON.parse(await textOf(b)));
    shaders.catch(() => undefined); // reported below
    const { device, adapter, features, chosen } = await openDevice(this.options);
    this.device = device;
    this.chosen = chosen; // the shader of each pipeline
    this.info.adapter = adapter;
    this.info.features = features;
    this.lost = null;
    this.fault = "";
    device.lost.then((info) => {
      if (this.device === device && !this.closed) this.lost = info.message || info.reason || "unknown";
    });
    device.addEventListener("uncapturederror", (e) => {
      this.fault = this.fault || e.error.message;
    });
    this.pending = [];
    this.weights = program.weights.map(([, bytes]) => this.allocate(bytes, "the weights"));
    const upload = this.files.shards(this.manifest.web.shards, (offset, bytes) => this.upload(offset, bytes), onBytes);
    try {
      await Promise.all([shaders.then((texts) => this.pipelines(texts)), upload, this.room()]);
      this.endsLoops = await this.probeLoops();
    } catch (error) {
      const own = error instanceof LuthierError ? error : this.lost ? this.deviceLost() : new KernelError("GPU", `the GPU refused the model: ${error.message}`, "update the browser and the driver; if it stays, report it");
      device.destroy(); // frees what there is of the weights
      throw own;
    }
    this.recorder = new Recorder(this, program);
    this.plans = new Map();
  }

  /** Whether the adapter ends a thread that goes through many rounds of a loop, as software does. Asked where the model may have such a thread. */
  async probeLoops() {
    if (!program.loops) return false;
    const { device } = this;
    const { buffer } = this.allocate(16, "a question to the adapter");
    const staging = device.createBuffer({ size: 16, usage: 1 | GPUBufferUsage_.COPY_DST });
    const pipeline = await device.createComputePipelineAsync({ layout: "auto", compute: { module: device.createShaderModule({ code: program.loops.probe }), entryPoint: "main" } });
    const group = device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries: [{ binding: 0, resource: { buffer } }] });
    const encoder = device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    pass.setPipeline(pipeline);
    pass.setBindGroup(0, group);
    pass.dispatchWorkgroups(1);
    pass.end();
    encoder.copyBufferToBuffer(buffer, 0, staging, 0, 16);
    device.queue.submit([encoder.finish()]);
    await staging.mapAsync(1);
    const [found] = new Uint32Array(staging.getMappedRange().slice(0));
    staging.destroy();
    buffer.destroy();
    return found !== program.loops.answer;
  }

  /** A buffer; room() tells whether the GPU had the memory. Raises OutOfMemoryError. */
  create(descriptor, what) {
    const { device } = this;
    const { size } = descriptor;
    if (size > device.limits.maxBufferSize) throw this.noMemory(what, `it needs a buffer of ${size} bytes, the adapter allows ${device.limits.maxBufferSize}`);
    device.pushErrorScope("out-of-memory");
    try {
      return device.createBuffer(descriptor);
    } catch (error) {
      throw error instanceof RangeError ? this.noMemory(what, error.message) : error;
    } finally {
      // a device that is lost answers to nothing
      this.pending.push(device.popErrorScope().then((error) => error && this.noMemory(what, error.message), () => null));
    }
  }

  /** Raises OutOfMemoryError where one of the buffers made since the last call of this has no memory. */
  async room() {
    const error = (await Promise.all(this.pending.splice(0))).find(Boolean);
    if (error) throw error;
  }

  allocate(bytes, what) {
    const usage = GPUBufferUsage_.STORAGE | GPUBufferUsage_.COPY_DST | GPUBufferUsage_.COPY_SRC;
    const size = Math.max(16, up4(bytes));
    return { buffer: this.create({ size, usage }, what), size };
  }

  noMemory(what, message) {
    return new OutOfMemoryError("NO_GPU_MEMORY", `the GPU has no memory for ${what} (${message})`, "close other pages that use the GPU, or use smaller inputs");
  }

  deviceLost() {
    return new DeviceLostError("DEVICE_LOST", `the GPU device was lost (${this.lost})`, "call run() again to reload the model; if it is lost again, use the package compiled for wasm");
  }

  upload(offset, bytes) {
    this.defaults.take(offset, bytes);
    program.weights.forEach(([start, size], k) => {
      const lo = Math.max(offset, start);
      const hi = Math.min(offset + bytes.length, start + up4(size));
      if (lo >= hi) return;
      let piece = bytes.subarray(lo - offset, hi - offset);
      if (piece.length % 4) {
        const padded = new Uint8Array(up4(piece.length));
        padded.set(piece);
        piece = padded;
      }
      this.device.queue.writeBuffer(this.weights[k].buffer, lo - start, piece.buffer, piece.byteOffset, piece.length);
    });
  }

  async pipelines(texts) {
    const { device } = this;
    const modules = new Map();
    const moduleOf = (s) => {
      const directives = program.features[s].filter((f) => ENABLE[f]).map((f) => `enable ${ENABLE[f]};\n`);
      if (!modules.has(s)) modules.set(s, device.createShaderModule({ code: directives.join("") + texts[s] }));
      return modules.get(s);
    };
    const layouts = new Map();
    const layoutOf = ({ bindings, uniforms }) => {
      const key = bindings + (uniforms ? "u" : "");
      if (!layouts.has(key)) {
        const entries = Array.from(key, (letter, binding) => ({
          binding,
          visibility: 4, // GPUShaderStage.COMPUTE
          buffer: { type: { r: "read-only-storage", w: "storage", u: "uniform" }[letter] },
        }));
        const group = device.createBindGroupLayout({ entries });
        layouts.set(key, { group, layout: device.createPipelineLayout({ bindGroupLayouts: [group] }) });
      }
      return layouts.get(key);
    };
    const failed = async (s, nodes, error) => {
      const { messages } = await moduleOf(s).getCompilationInfo();
      const lines = messages.filter((m) => m.type === "error").map((m) => `${m.lineNum}:${m.linePos} ${m.message}`);
      const text = lines.length ? lines.join("\n") : error.message;
      return new KernelError("SHADER", `the GPU refused shader ${s} of "${nodes.join(", ")}": ${text}`, "update the browser and the driver; if it stays, report it", { shader: s, nodes });
    };
    this.compiled = await Promise.all(
      program.pipelines.map(async (p, k) => {
        const s = this.chosen[k];
        const { group, layout } = layoutOf(p);
        try {
          const pipeline = await device.createComputePipelineAsync({ layout, compute: { module: moduleOf(s), entryPoint: "main" } });
          return { pipeline, group };
        } catch (error) {
          throw this.lost ? this.deviceLost() : await failed(s, p.nodes, error);
        }
      }),
    );
  }

  narrow(ins) {
    for (const j of program.narrow) {
      const low = ins[j].data instanceof BigUint64Array ? BigInt.asUintN : BigInt.asIntN;
      for (const v of ins[j].data) {
        if (v !== low(32, v)) {
          const { name } = this.manifest.inputs[j];
          throw new InputError("OUT_OF_RANGE", `input "${name}" holds ${v}, the kernels that read it take 32-bit integers`, "use the package compiled for wasm", { name });
        }
      }
    }
  }

  /** Raises InputError for an index among the inputs that lies outside of what it indexes. */
  within(ins) {
    for (const [j, low, high, what] of program.within({ dim: (k, axis) => ins[k].shape[axis] })) {
      const { data } = ins[j];
      for (let k = 0; k < data.length; k++) {
        const [least, greatest] = [low[k % low.length], high[k % low.length]];
        if (data[k] < least || data[k] > greatest) {
          const { name } = this.manifest.inputs[j];
          throw new InputError("OUT_OF_RANGE", `${what} in input "${name}" is ${data[k]}, it must be ${least} to ${greatest}`, "look at what the input holds", { name });
        }
      }
    }
  }

  async run(inputs, outputs) {
    const wanted = chooseOutputs(this.manifest.outputs, outputs);
    const ins = checkInputs(this.manifest.inputs, inputs, [], this.defaults);
    this.narrow(ins);
    this.within(ins);
    for (let round = 0; ; round++) {
      try {
        if (this.lost) await this.restart();
        return await this.attempt(ins, wanted);
      } catch (error) {
        const soon = new Promise((resolve) => setTimeout(resolve, 50));
        if (!(error instanceof InputError)) await Promise.race([this.device.lost, soon]); // what failed may have failed because of it
        if (!this.lost) {
          const memory = await this.forget().then(() => error, (e) => e);
          if (memory instanceof LuthierError) throw memory;
          throw error instanceof RangeError ? error : new KernelError("GPU", `the run failed: ${error.message}`, "report it");
        }
        if (round > 0) throw this.deviceLost();
      }
    }
  }

  /** A call failed: what it made, and what it may have left unfinished, goes. Raises OutOfMemoryError when that was the cause. */
  async forget() {
    const cause = this.room();
    cause.catch(() => undefined);
    this.recorder.discard();
    this.recorder = new Recorder(this, program);
    this.plans.clear();
    await Promise.race([this.device.queue.onSubmittedWorkDone(), this.device.lost]); // late reports belong to the call that failed
    this.fault = "";
    await cause;
  }

  async restart() {
    const { restarts, warnings } = this.info;
    try {
      await this.start(() => undefined);
    } catch (error) {
      if (!this.lost) this.lost = error.message;
      throw new DeviceLostError("DEVICE_LOST", `the GPU device was lost and the model could not be reloaded: ${error.message}`, "reload the page, or use the package compiled for wasm");
    }
    this.info = { ...this.info, restarts: restarts + 1, warnings };
  }

  async attempt(ins, wanted) {
    const { device, recorder, manifest } = this;
    const key = ins.map((t) => t.shape.join()).join(";");
    const known = this.plans.get(key);
    recorder.begin(ins);
    ins.forEach((t, j) => recorder.setInput(j, toBytes(manifest.inputs[j].code, t.data)));
    if (!known) device.pushErrorScope("validation");
    let refused = null;
    let plan = this.plans.get(key); // setInput may have thrown the plans away
    let staging = null;
    let places = [];
    try {
      if (!plan) {
        await program.main(recorder);
        plan = recorder.plan();
      }
      let size = 0;
      places = wanted.map((j) => {
        const { shape } = plan.outputs[j];
        const at = size;
        size += up8(Math.max(4, byteSize(manifest.outputs[j].code, product(shape))));
        return at;
      });
      if (size) staging = recorder.staging(size);
      recorder.finish(plan, wanted.map((j, k) => [plan.outputs[j], staging, places[k], up4(Math.max(1, byteSize(manifest.outputs[j].code, product(plan.outputs[j].shape))))]));
    } finally {
      if (!known) refused = device.popErrorScope();
    }
    const done = staging ? staging.mapAsync(1) : device.queue.onSubmittedWorkDone();
    done.catch(() => undefined); // the cause, if there is one, comes first
    await this.room();
    const validation = await refused;
    if (validation) throw new KernelError("GPU", `the GPU refused a command: ${validation.message}`, "report it");
    await done;
    if (this.fault) throw new KernelError("GPU", `the GPU reported: ${this.fault}`, "report it");
    if (plan.replayable && !known) {
      if (this.plans.size >= PLANS) this.plans.delete(this.plans.keys().next().value);
      this.plans.set(key, plan);
    }
    const result = {};
    if (staging) {
      const bytes = new Uint8Array(staging.getMappedRange());
      wanted.forEach((j, k) => {
        const port = manifest.outputs[j];
        result[port.name] = fromBytes(port.code, plan.outputs[j].shape, bytes.subarray(places[k]));
      });
      staging.unmap();
      recorder.release(staging);
    }
    this.info.dispatches = plan.dispatches;
    return result;
  }

  async close() {
    this.closed = true;
    this.device.destroy();
  }

  /** For tests: "lose" loses the device. */
  async debug(action) {
    if (action !== "lose") throw new InputError("UNKNOWN_ACTION", `no action ${action}`);
    this.device.destroy();
    await this.device.lost;
  }
}

// The numbers of the specification: `GPUBufferUsage` is no global where a device comes from a package.
const GPUBufferUsage_ = { COPY_SRC: 4, COPY_DST: 8, STORAGE: 128 };

