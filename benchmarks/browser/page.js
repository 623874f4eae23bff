// The page's side of tests and benchmarks: functions that the driver calls, data as JSON (arrays as {dtype, shape, file or fill}, results in base64).

const TYPES = { float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array, bool: Uint8Array, float16: Uint16Array };
const models = new Map();
let next = 1;

export async function tensor({ dtype, shape, file, fill }) {
  if (fill !== undefined) return { data: new TYPES[dtype](shape.reduce((a, b) => a * b, 1)).fill(fill), shape };
  const buffer = await (await fetch(file)).arrayBuffer();
  return { data: new TYPES[dtype](buffer), shape };
}

const plain = (error) => ({ error: error.name, code: error.code || "", message: error.message, hint: error.hint || "" });

/** Loads a package; {key, info, progress} or {error, code, message, hint}. */
export async function load({ url, options }) {
  const { load: open } = await import(`${url}index.js`);
  const progress = [];
  const start = performance.now();
  try {
    const model = await open(url, { ...options, onProgress: (p) => progress.push(p) });
    models.set(next, model);
    return { key: next++, info: model.info, progress, ms: performance.now() - start, inputs: model.inputs, outputs: model.outputs };
  } catch (error) {
    return { ...plain(error), ms: performance.now() - start };
  }
}

const encode = (t) => {
  const bytes = new Uint8Array(t.data.buffer, t.data.byteOffset, t.data.byteLength);
  let text = "";
  for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
  return { dtype: t.dtype, shape: t.shape, base64: btoa(text) };
};

/** Runs a loaded model on inputs that the server has as files. */
export async function run({ key, inputs, outputs, times = 1 }) {
  try {
    const model = models.get(key);
    const given = {};
    for (const [name, t] of Object.entries(inputs)) given[name] = t.dtype ? await tensor(t) : t;
    let result;
    const ms = [];
    for (let k = 0; k < times; k++) {
      const start = performance.now();
      result = await model.run(given, { outputs });
      ms.push(performance.now() - start);
    }
    return { outputs: Object.fromEntries(Object.entries(result).map(([n, t]) => [n, encode(t)])), ms, info: model.info };
  } catch (error) {
    return plain(error);
  }
}

export async function close({ key }) {
  await models.get(key).close();
  models.delete(key);
}

/** Runs a model several times at once and loses its device meanwhile. */
export async function runAndLose({ key, inputs }) {
  const replies = inputs.map((given) => run({ key, inputs: given }));
  await new Promise((resolve) => setTimeout(resolve, 0));
  await models.get(key).debug("lose");
  return Promise.all(replies);
}

/** Whether this page may evaluate text. */
export function evaluates() {
  try {
    return new Function("return true")();
  } catch {
    return false;
  }
}

/** Loads weights and manifest from another address than the code. */
export async function loadFrom({ code, url }) {
  const { load: open } = await import(`${code}index.js`);
  try {
    return { key: Boolean(await open(url, {})) };
  } catch (error) {
    return plain(error);
  }
}

export const debug = ({ key, action }) => models.get(key).debug(action);

export const isolated = () => globalThis.crossOriginIsolated;

let worker = null;

/** Calls a function of this file in a worker that the page made itself. */
export async function inWorker({ name, argument }) {
  const answer = () => new Promise((resolve, reject) => {
    worker.onmessage = (e) => resolve(e.data);
    worker.onerror = (e) => reject(new Error(e.message));
  });
  if (!worker) {
    worker = new Worker("./page_worker.js", { type: "module" });
    await answer();
  }
  const result = answer();
  worker.postMessage({ name, argument });
  return result;
}
