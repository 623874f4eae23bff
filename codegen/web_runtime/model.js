// What index.js hands out: `load` and the Model. In a page the engine lives in a worker, elsewhere on the caller's thread.

import { asLuthierError, ClosedError, InputError, KernelError, UnsupportedError, unpack } from "./errors.js";
import { isPage, openWorker } from "./platform.js";
import { dtypeName } from "./tensors.js";

const WORKER_START = 20000; // milliseconds

class Inline {
  static async open(base, id, options, onProgress) {
    const { describe, openEngine } = await import("./engine.js"); // a page whose engine is in a worker does without
    const backend = new Inline();
    const { engine, manifest } = await openEngine(base, id, options, onProgress);
    backend.engine = engine;
    backend.queue = Promise.resolve();
    backend.described = { ...describe(manifest), info: engine.info };
    return backend;
  }

  get info() {
    return this.engine.info;
  }

  next(action) {
    const result = this.queue.then(action);
    this.queue = result.catch(() => undefined);
    return result;
  }

  run(inputs, outputs, into) {
    return this.next(() => this.engine.run(inputs, outputs, into));
  }

  views(shapes) {
    return this.engine.views ? this.next(() => this.engine.views(shapes)) : noViews("inputs of this target are not in memory of the page's own", "call run() with arrays");
  }

  async close() {
    await this.queue;
    await this.engine.close();
  }

  debug(action) {
    return this.engine.debug(action);
  }
}

function noViews(why, hint) {
  throw new UnsupportedError("NO_VIEWS", `there are no views of the inputs: ${why}`, hint);
}

class Remote {
  static async open(base, id, options, onProgress) {
    const backend = new Remote();
    backend.waiting = new Map();
    backend.next = 1;
    backend.worker = await openWorker(new URL("./worker.js", import.meta.url), "luthier");
    const { signal, ...plain } = options;
    backend.faults = new BroadcastChannel(`luthier-${globalThis.crypto.randomUUID ? globalThis.crypto.randomUUID() : Math.random()}`);
    if (backend.faults.unref) backend.faults.unref();
    backend.faults.addEventListener("message", (e) => backend.fail(new KernelError("TRAP", `a thread of the model failed: ${e.data}`, "load the model again; if it fails again with these inputs, report it")));
    plain.faults = backend.faults.name;
    try {
      await new Promise((resolve, reject) => {
        const timer = setTimeout(() => reject(new ClosedError("WORKER_NOT_STARTED", `the worker did not start within ${WORKER_START / 1000} s`, "see that runtime/worker.js is served as JavaScript, and that the Content-Security-Policy allows workers from it")), WORKER_START);
        backend.worker.onMessage((m) => {
          if (m.ready) {
            clearTimeout(timer);
            resolve();
          } else if (m.progress) onProgress(m.progress);
          else backend.settle(m);
        });
        backend.worker.onError((error) => {
          clearTimeout(timer);
          const failure = new ClosedError("WORKER_FAILED", `the worker failed: ${error.message}`, "load the model again");
          reject(failure);
          backend.fail(failure);
        });
      });
      const stop = () => backend.fail(new ClosedError("ABORTED", "loading was aborted"));
      if (signal) {
        if (signal.aborted) stop();
        signal.addEventListener("abort", stop);
      }
      backend.described = await backend.ask("load", { base: base.href, mark: id, options: plain });
      backend.info = backend.described.info;
      if (signal) signal.removeEventListener("abort", stop);
    } catch (error) {
      backend.fail(error);
      throw error;
    }
    return backend;
  }

  ask(op, data, transfer) {
    if (this.failure) return Promise.reject(this.failure);
    const id = this.next++;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.hold(true);
      try {
        this.worker.post({ id, op, ...data }, transfer);
      } catch (error) {
        this.waiting.delete(id);
        reject(new InputError("NOT_CLONABLE", `an input cannot be sent to the worker: ${error.message}`, "pass typed arrays"));
      }
    });
  }

  settle({ id, value, error, info }) {
    const call = this.waiting.get(id);
    if (!call) return;
    this.waiting.delete(id);
    if (!this.waiting.size) this.worker.hold(false);
    if (info) this.info = info;
    if (error) call.reject(unpack(error));
    else call.resolve(value);
  }

  fail(error) {
    this.failure = error;
    for (const call of this.waiting.values()) call.reject(error);
    this.waiting.clear();
    this.faults.close();
    this.worker.terminate();
  }

  run(inputs, outputs) {
    return this.ask("run", { inputs, outputs });
  }

  views() {
    return noViews("the model lives in a worker", "load it with {worker: false} in a worker of the page's own");
  }

  async close() {
    await this.ask("close", {});
    this.fail(new ClosedError("CLOSED", "the model was closed", "load it again"));
  }

  debug(action) {
    return this.ask("debug", { action });
  }
}

/** The data of an output in an array of the caller's, unless it is there already. Raises InputError. */
function put(tensor, array, name) {
  if (!tensor) throw new InputError("UNKNOWN_OUTPUT", `into: there is no output "${name}" in this call`, "name outputs that the call returns", { name });
  if (tensor.data === array) return;
  if (!array || array.constructor !== tensor.data.constructor) throw new InputError("WRONG_DTYPE", `into: output "${name}" is ${tensor.dtype}`, `pass a ${tensor.data.constructor.name}`, { name });
  if (array.length !== tensor.data.length) throw new InputError("WRONG_SHAPE", `into: output "${name}" has ${tensor.data.length} elements, the array ${array.length}`, "", { name });
  array.set(tensor.data);
  tensor.data = array;
}

/** A loaded model. Calls are queued: one runs at a time. */
export class Model {
  #backend;
  #closed = false;

  constructor(backend) {
    this.#backend = backend;
    const { inputs, outputs, name, language } = backend.described;
    const spec = (p) => Object.freeze({ name: p.name, dtype: dtypeName(p.code), shape: Object.freeze([...p.shape]), ...(p.default && { optional: true }) });
    this.name = name;
    if (language) this.language = language; // what language.js needs to know
    this.inputs = Object.freeze(inputs.map(spec));
    this.outputs = Object.freeze(outputs.map(spec));
  }

  /** What the model runs on: backend, variant, threads, adapter, warnings. */
  get info() {
    return this.#backend.info;
  }

  /**
   * {input name: typed array, or {data, shape}} to {output name: {data, shape, dtype}}; `options.outputs`: names of those wanted;
   * `options.into`: {output name: typed array} that takes the data in place of a new array.
   */
  async run(inputs, options = {}) {
    if (this.#closed) throw new ClosedError("CLOSED", "the model was closed", "load it again");
    if (inputs === null || typeof inputs !== "object") throw new InputError("INPUTS_NOT_AN_OBJECT", "run() takes an object of inputs by name");
    try {
      const results = await this.#backend.run(inputs, options.outputs, options.into);
      for (const [name, array] of Object.entries(options.into || {})) put(results[name], array, name);
      return results;
    } catch (error) {
      throw asLuthierError(error);
    }
  }

  /**
   * wasm without a worker: {input name: typed array over the model's own memory}. Filled and given to run(), they are not copied. `shapes`:
   * {name: [...]} of inputs with open extents. They end when the model runs with other extents, or with an output whose size only the run knows.
   */
  async views(shapes = {}) {
    if (this.#closed) throw new ClosedError("CLOSED", "the model was closed", "load it again");
    try {
      return await this.#backend.views(shapes);
    } catch (error) {
      throw asLuthierError(error);
    }
  }

  /** Frees memory and workers. */
  async close() {
    if (this.#closed) return;
    this.#closed = true;
    await this.#backend.close();
  }

  /** For tests: actions of the engine, such as losing the GPU device. */
  debug(action) {
    return this.#backend.debug(action);
  }
}

/**
 * Loads the model whose folder is `base` (a URL, or text relative to the page). Options: onProgress({loaded, total}), threads,
 * requireThreads, variant, stall (milliseconds without a byte), signal (AbortSignal), worker (default: true in a page).
 */
export async function loadModel(base, id, { onProgress = () => undefined, worker = isPage, ...options } = {}) {
  const Backend = worker ? Remote : Inline;
  try {
    return new Model(await Backend.open(base, id, options, onProgress));
  } catch (error) {
    throw asLuthierError(error);
  }
}
