// Runs a model compiled to WebAssembly on this thread and its helpers. The ABI of the module is described in docs/web.md.

import { IsolationError, InputError, KernelError, OutOfMemoryError, UnsupportedError } from "./errors.js";
import { canShare, cores, hasWorkers, mayWait, openWorker } from "./platform.js";
import { byteSize, checkInputs, chooseOutputs, Defaults, fromBytes, knownShapes, product, toBytes, viewOf } from "./tensors.js";

const RECORD = 48; // bytes of one tensor's record in the io table
const THREAD_START = 10000; // milliseconds that a helper thread may take to start

const decode = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

/** Why WebAssembly refused `what`: a policy, or the engine itself. */
const refused = (what) => (error) => {
  if (/content.security.policy|\bCSP\b|unsafe-eval/i.test(error.message)) {
    throw new UnsupportedError("POLICY", "the Content-Security-Policy forbids WebAssembly", "add 'wasm-unsafe-eval' to its script-src (content_security_policy.extension_pages in an extension)");
  }
  throw new UnsupportedError("CODE_REFUSED", `this engine refuses ${what}: ${error.message}`, "leave the option variant out, or update the browser");
};

/** Whether relaxed dot products of 8-bit integers are right here: some baseline compilers had them wrong. */
async function dotWorks(probe) {
  if (!probe) return true;
  try {
    const { instance } = await WebAssembly.instantiate(decode(probe), { env: { memory: new WebAssembly.Memory({ initial: 1 }) } }).catch(refused("a probe"));
    return instance.exports.check() === 1;
  } catch (error) {
    if (error.code === "POLICY") throw error;
    return false;
  }
}

const variantsOf = (manifest) => Object.keys(manifest.files).flatMap((f) => /^model\.(.+)\.wasm$/.exec(f)?.[1] ?? []);

/** The variant to load, and how many threads it may use. `warnings` tells why it is not a better one. */
async function choose(manifest, options, warnings) {
  const { wasm } = manifest;
  const variants = variantsOf(manifest);
  const valid = (name) => WebAssembly.validate(decode(wasm.probes[name]));
  if (typeof WebAssembly !== "object" || !valid("simd")) {
    throw new UnsupportedError("NO_WASM_SIMD", "this browser has no WebAssembly with 128-bit SIMD", "use a browser of 2021 or later (Safari: 16.4)");
  }
  let threads = Math.max(1, Math.floor(options.threads || Math.min(await cores(), 8)));
  if (!wasm.parallel) threads = 1;
  if (threads > 1) {
    const why = !hasWorkers
      ? "there are no workers in this place"
      : !canShare()
      ? globalThis.crossOriginIsolated ? "the browser has no shared memory" : "the page is not cross-origin isolated"
      : !valid("threads")
        ? "the browser has no WebAssembly threads"
        : "";
    if (why && options.requireThreads) {
      throw new IsolationError("NO_ISOLATION", `${why}, so there are no threads`, "serve the page with Cross-Origin-Opener-Policy: same-origin and Cross-Origin-Embedder-Policy: require-corp");
    }
    if (why) {
      warnings.push(`one thread: ${why}`);
      threads = 1;
    }
  }
  const suffix = threads > 1 ? "-threads" : "";
  if (options.variant) {
    if (!variants.includes(options.variant)) {
      throw new InputError("UNKNOWN_VARIANT", `there is no variant "${options.variant}"`, `the package has ${variants.join(", ")}`);
    }
    const shared = options.variant.endsWith("-threads");
    if (shared && !canShare()) throw new IsolationError("NO_ISOLATION", `the variant ${options.variant} needs a cross-origin isolated page`, "serve the page with COOP and COEP headers");
    return { variant: options.variant, threads: shared ? threads : 1 };
  }
  let simd = "simd";
  if (valid("relaxed")) {
    if (await dotWorks(wasm.probes.dot)) simd = "relaxed";
    else warnings.push("baseline SIMD: relaxed dot products are wrong on this browser and processor");
  }
  const name = simd + suffix;
  return { variant: variants.includes(name) ? name : "simd", threads: variants.includes(name) ? threads : 1 };
}

/** The model's memory. Shared memory reserves addresses up to its maximum (0: not shared): where these are rare, less is asked for. */
function allocate(initial, maximum) {
  const tries = maximum ? [maximum, maximum / 2, Math.min(maximum, Math.max(maximum / 4, 4 * initial))] : [0];
  let last;
  for (const most of tries) {
    if (most && most < initial) continue;
    try {
      return new WebAssembly.Memory(most ? { initial, maximum: most, shared: true } : { initial });
    } catch (error) {
      last = error;
    }
  }
  throw new OutOfMemoryError("NO_MEMORY", `no ${Math.ceil(initial / 16)} MB of memory for the weights (${last.message})`, "close other tabs, or use a smaller model");
}

/** @implements the engine interface: load, run, close, info. */
export class Engine {
  constructor(manifest) {
    this.manifest = manifest;
    this.wasm = manifest.wasm;
    this.defaults = new Defaults(manifest.inputs);
    this.threads = [];
    this.key = "";
    this.immediate = true; // run() has read its inputs when it returns
  }

  static async load(manifest, files, options, onBytes) {
    const engine = new Engine(manifest);
    engine.again = () => Engine.load(manifest, files, options, () => undefined);
    const warnings = [];
    const { variant, threads } = await choose(manifest, options, warnings);
    const shared = variant.endsWith("-threads");
    const { pages: initial, max_pages: maximum, weights } = manifest.wasm;
    engine.memory = allocate(initial, shared ? maximum : 0);
    const file = `model.${variant}.wasm`;
    const compile = files.checked(file, manifest.files[file], onBytes).then((bytes) => WebAssembly.compile(bytes).catch(refused(file)));
    const store = (offset, bytes) => {
      new Uint8Array(engine.memory.buffer, weights + offset, bytes.length).set(bytes);
      engine.defaults.take(offset, bytes);
    };
    const upload = files.shards(manifest.web.shards, store, onBytes);
    const [module] = await Promise.all([compile, upload]);
    engine.module = module;
    engine.exports = (await WebAssembly.instantiate(module, { env: { memory: engine.memory } })).exports;
    engine.count = 1;
    if (threads > 1) await engine.startThreads(threads, warnings, options);
    engine.info = { backend: "wasm", variant, threads: engine.count, crossOriginIsolated: canShare(), warnings };
    return engine;
  }

  async startThreads(threads, warnings, options) {
    const literal = () => new Worker(new URL("./thread.js", import.meta.url), { type: "module" });
    const start = async (number) => {
      const worker = await openWorker(literal, null, THREAD_START);
      this.threads.push(worker);
      await new Promise((resolve, reject) => {
        worker.onMessage((m) => m.ready && resolve());
        worker.onError(reject);
        worker.post({ module: this.module, memory: this.memory, number, faults: options.faults });
      });
    };
    try {
      await Promise.all(Array.from({ length: threads - 1 }, (_, k) => start(k + 1)));
      this.count = threads;
    } catch (error) {
      warnings.push(`one thread: a worker could not be started (${error.message})`);
      this.stopThreads();
      this.count = 1;
    }
  }

  stopThreads() {
    if (this.threads.length && this.exports.lt_stop) this.exports.lt_stop();
    for (const worker of this.threads) worker.terminate();
    this.threads = [];
  }

  /** After a trap nothing in the memory can be trusted: the model is loaded again, unless it had a state to lose. */
  async recover() {
    if (this.manifest.language) throw new KernelError("TRAP", "the compiled model failed in an earlier call", "load the model again");
    for (const worker of this.threads) worker.terminate();
    Object.assign(this, await this.again(), { broken: false });
  }

  record(k) {
    return new DataView(this.memory.buffer, this.wasm.io + RECORD * k, RECORD);
  }

  bind(ins) {
    const key = ins.map((t) => t.shape.join()).join(";");
    if (key === this.key) return;
    this.key = "";
    ins.forEach((t, k) => {
      const r = this.record(k);
      t.shape.forEach((n, axis) => r.setInt32(16 + 4 * axis, n, true));
    });
    this.check(this.call(() => this.exports.lt_bind(this.count)));
    this.key = key;
  }

  call(f) {
    try {
      return f();
    } catch (error) {
      if (!(error instanceof WebAssembly.RuntimeError)) throw error;
      this.broken = true;
      this.immediate = false;
      throw new KernelError("TRAP", `the compiled model failed: ${error.message}`, "call again: the model is loaded anew; if it fails again with these inputs, report it");
    }
  }

  check(status) {
    if (status === 0) return;
    const v = new DataView(this.memory.buffer, this.wasm.error, 40);
    const kind = v.getInt32(4, true);
    const name = this.wasm.names[v.getInt32(8, true)];
    const axis = v.getInt32(12, true);
    const [got, want, want2] = [16, 24, 32].map((at) => Number(v.getBigInt64(at, true)));
    if (kind === 3) throw new OutOfMemoryError("NO_MEMORY", `no memory for ${got} bytes of ${name}`, "use smaller inputs or close other tabs");
    const text = {
      1: `input "${name}": dimension ${axis} is ${got}, expected ${want}`,
      2: `input "${name}": dimension ${axis} is ${got}, allowed are ${want} to ${want2}`,
      4: `${name} do not fit: ${got} against ${want}`,
      5: `${name}: dimension ${axis} would be ${got}; the inputs do not allow it`,
      6: `${name} is ${got} in the data of this run, allowed are ${want} to ${want2}`,
    }[kind];
    throw new InputError("WRONG_SHAPE", text || `the run failed with status ${status}, kind ${kind}`, "change the inputs", { name, axis, got, want });
  }

  /** {name: typed array over the input's own memory} for inputs of these extents: given to run() as they are, nothing is copied. */
  async views(shapes) {
    if (this.broken) await this.recover();
    const { inputs, language } = this.manifest;
    if (language) throw new UnsupportedError("NO_VIEWS", "a language model keeps its state in its inputs", "call run() with arrays");
    const ins = knownShapes(inputs, shapes);
    this.bind(ins);
    const views = inputs.map((port, k) => [port.name, viewOf(port.code, this.memory.buffer, this.record(k).getUint32(0, true), product(ins[k].shape))]);
    return Object.fromEntries(views.filter(([, view]) => view));
  }

  async run(inputs, outputs, into = {}) {
    if (this.broken) await this.recover();
    const { manifest } = this;
    const wanted = chooseOutputs(manifest.outputs, outputs);
    const ins = checkInputs(manifest.inputs, inputs, manifest.language?.state, this.defaults);
    this.bind(ins);
    ins.forEach((t, k) => {
      if (t.data === null) return; // it lies in the memory, at an address that does not depend on the other inputs
      const address = this.record(k).getUint32(0, true);
      if (t.data.buffer === this.memory.buffer && t.data.byteOffset === address) return; // a view: it is there
      const bytes = toBytes(manifest.inputs[k].code, t.data);
      new Uint8Array(this.memory.buffer, address, bytes.length).set(bytes);
    });
    this.check(this.call(() => this.exports.lt_run(this.count, mayWait() ? 1 : 0)));
    return Object.fromEntries(
      wanted.map((j) => {
        const port = manifest.outputs[j];
        const r = this.record(manifest.inputs.length + j);
        const shape = port.shape.map((_, axis) => r.getInt32(16 + 4 * axis, true));
        const size = byteSize(port.code, product(shape));
        const bytes = new Uint8Array(this.memory.buffer, r.getUint32(0, true), size);
        return [port.name, fromBytes(port.code, shape, bytes, into[port.name])];
      }),
    );
  }

  async close() {
    this.stopThreads();
    this.memory = this.exports = this.module = null;
  }
}

