// What index.js hands out: `load` and the Model. In a page the engine lives in a worker, elsewhere on the caller's thread.

import { describe, openEngine } from "./engine.js";
import { asLuthierError, ClosedError, InputError, KernelError, UnsupportedError, unpack } from "./errors.js";
import { isPage, openWorker, resolve } from "./platform.js";
import { buffersOf, dtypeName, fill, snapshot } from "./tensors.js";

class Inline {
  static async open(places, id, options, onProgress) {
    const backend = new Inline();
    const { engine, manifest } = await openEngine(places, id, options, onProgress);
    backend.engine = engine;
    backend.queue = Promise.resolve();
    backend.waiting = 0;
    backend.described = { ...describe(manifest), info: engine.info };
    return backend;
  }

  get info() {
    return this.engine.info;
  }

  next(action) {
    this.waiting++;
    const result = this.queue.then(action).finally(() => this.waiting--);
    this.queue = result.catch(() => undefined);
    return result;
  }

  /** The inputs are read before this returns: at once, or as a copy where the engine reads them later. */
  run(inputs, outputs, into) {
    if (this.engine.immediate && !this.waiting) return this.engine.run(inputs, outputs, into);
    const kept = snapshot(inputs, this.engine.memory);
    return this.next(() => this.engine.run(kept, outputs, into));
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
  static async open(places, id, options, onProgress) {
    const backend = new Remote();
    backend.waiting = new Map();
    backend.next = 1;
    try {
      const beside = places.base ? new URL("runtime/worker.js", places.base) : null;
      backend.worker = await openWorker(() => new Worker(new URL("./worker.js", import.meta.url), { type: "module" }), beside);
    } catch (error) {
      throw new ClosedError("WORKER_NOT_STARTED", `the worker could not be started (${error.message})`, "serve runtime/worker.js as JavaScript, and allow workers from it in the Content-Security-Policy");
    }
    const { signal, ...plain } = options;
    backend.faults = new BroadcastChannel(`luthier-${globalThis.crypto && globalThis.crypto.randomUUID ? globalThis.crypto.randomUUID() : Math.random()}`);
    if (backend.faults.unref) backend.faults.unref();
    backend.faults.addEventListener("message", (e) => backend.fail(new KernelError("TRAP", `a thread of the model failed: ${e.data}`, "load the model again; if it fails again with these inputs, report it")));
    plain.faults = backend.faults.name;
    backend.worker.onMessage((m) => (m.progress ? onProgress(m.progress) : backend.settle(m)));
    backend.worker.onError((error) => backend.fail(new ClosedError("WORKER_FAILED", `the worker failed: ${error.message}`, "load the model again")));
    try {
      const stop = () => backend.fail(new ClosedError("ABORTED", "loading was aborted"));
      if (signal) {
        if (signal.aborted) stop();
        signal.addEventListener("abort", stop);
      }
      backend.described = await backend.ask("load", { places, mark: id, options: plain });
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
        reject(new InputError("NOT_CLONABLE", `an input cannot be sent to the worker: ${error.message}`, "pass typed arrays of less than 2 GB"));
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
    const kept = snapshot(inputs); // postMessage would clone the whole buffer behind a small view
    return this.ask("run", { inputs: kept, outputs }, buffersOf(kept));
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
  fill(array, tensor, name);
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
    checkOptions(options, RUN, "run()");
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

const LOAD = new Set(["onProgress", "threads", "requireThreads", "variant", "stall", "signal", "worker", "powerPreference", "features", "gpu"]);
const RUN = new Set(["outputs", "into"]);

function checkOptions(options, known, call) {
  const unknown = Object.keys(options).find((name) => !known.has(name));
  if (unknown !== undefined) throw new InputError("UNKNOWN_OPTION", `${call} has no option "${unknown}"`, `the options are ${[...known].filter((name) => name !== "gpu").join(", ")}`);
}

/** Where the files are: {base} or {files}, as text. `where`: {url: what load() was given, files: {name: URL} of the package itself}. */
export function placesOf({ url, files }) {
  if (url === undefined || url === null) return { files: Object.fromEntries(Object.entries(files).map(([name, at]) => [name, at.href])) };
  if (typeof url === "object" && typeof url.href !== "string") throw new InputError("UNKNOWN_OPTION", "load() takes the address of the model first", "load(undefined, options) for the package itself");
  const text = String(url);
  try {
    return { base: resolve(text.endsWith("/") ? text : `${text}/`).href };
  } catch {
    throw new InputError("BAD_ADDRESS", `load() cannot read the address "${text}"`, "pass a URL, or text relative to the page");
  }
}

/**
 * Loads the model at `where` (see placesOf). Options: onProgress({loaded, total}), threads, requireThreads, variant, stall (milliseconds
 * without a byte), signal (AbortSignal), worker (default: in a page, where one can be had), powerPreference, features.
 */
export async function loadModel(where, id, given = {}) {
  checkOptions(given, LOAD, "load()");
  const { onProgress = () => undefined, worker, ...options } = given;
  const places = placesOf(where);
  let word = "";
  try {
    if (worker || (worker === undefined && isPage)) {
      try {
        return new Model(await Remote.open(places, id, options, onProgress));
      } catch (error) {
        if (worker || error.code !== "WORKER_NOT_STARTED") throw error;
        word = `inference on the page's own thread: ${error.message}`;
      }
    }
    const backend = await Inline.open(places, id, options, onProgress);
    if (word) backend.info.warnings.unshift(word);
    return new Model(backend);
  } catch (error) {
    throw asLuthierError(error);
  }
}
