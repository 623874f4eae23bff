// The page's side of benchmarks/web.py: one runtime a page; a row is set up, then timed in turns.

const TYPES = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, uint8: Uint8Array };
const NPM = "/node_modules";
let current = null;

const fetched = async ({ dtype, file }) => new TYPES[dtype](await (await fetch(file)).arrayBuffer());

function script(src) {
  return new Promise((resolve, reject) => {
    const tag = document.createElement("script");
    Object.assign(tag, { src, onload: resolve, onerror: () => reject(new Error(`cannot load ${src}`)) });
    document.head.append(tag);
  });
}

async function luthier(row, { target, resident, ...options }) {
  const url = row.packages[target];
  const { load } = await import(`${url}index.js`);
  const model = await load(url, { worker: false, ...options });
  const inputs = {};
  for (const [name, t] of Object.entries(row.inputs)) inputs[name] = { data: await fetched(t), shape: t.shape };
  if (resident) {
    const views = await model.views(Object.fromEntries(Object.entries(inputs).map(([name, t]) => [name, t.shape])));
    for (const [name, t] of Object.entries(inputs)) {
      views[name].set(t.data);
      t.data = views[name];
    }
    options.into = { [row.output]: (await model.run(inputs))[row.output].data };
  }
  const how = { into: options.into };
  return { call: async () => (await model.run(inputs, how))[row.output].data, close: () => model.close(), info: model.info };
}

async function onnxruntime(row, { backend, threads }) {
  const ort = await import(`${NPM}/onnxruntime-web/dist/${backend === "webgpu" ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs"}`);
  ort.env.wasm.wasmPaths = `${NPM}/onnxruntime-web/dist/`;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  const session = await ort.InferenceSession.create(row.model, { executionProviders: [backend] });
  const inputs = {};
  for (const [name, t] of Object.entries(row.inputs)) inputs[name] = new ort.Tensor(t.dtype, await fetched(t), t.shape);
  return { call: async () => (await session.run(inputs))[row.output].data, close: () => session.release(), info: {} };
}

async function tensorflow(row, { backend, threads }) {
  if (!row.operator) throw new Error("TF.js cannot read ONNX files");
  if (!globalThis.tf) {
    await script(`${NPM}/@tensorflow/tfjs/dist/tf.min.js`);
    await script(`${NPM}/@tensorflow/tfjs-backend-${backend}/dist/tf-backend-${backend}.min.js`);
  }
  const { tf } = globalThis;
  if (backend === "wasm") {
    tf.wasm.setWasmPaths(`${NPM}/@tensorflow/tfjs-backend-wasm/dist/`);
    tf.wasm.setThreadsCount(threads);
  }
  if (!(await tf.setBackend(backend))) throw new Error(`TF.js has no backend ${backend}`);
  await tf.ready();
  const t = {};
  for (const [name, v] of Object.entries({ ...row.inputs, ...row.constants })) t[name] = tf.tensor(await fetched(v), v.shape);
  const operators = {
    matmul: () => tf.matMul(t.x, t.w),
    softmax: () => tf.softmax(t.x),
    layernorm: () => {
      const { mean, variance } = tf.moments(t.x, 1, true);
      return t.x.sub(mean).div(variance.add(1e-5).sqrt()).mul(t.s).add(t.b);
    },
  };
  const call = async () => {
    const y = tf.tidy(operators[row.operator]);
    const data = backend === "wasm" ? y.dataSync() : await y.data();
    y.dispose();
    return data;
  };
  return { call, close: () => Object.values(t).forEach((v) => v.dispose()), info: {} };
}

async function jaxjs(row, { backend }) {
  if (!row.operator) throw new Error("jax-js cannot read ONNX files");
  const jax = await import(`${NPM}/@jax-js/jax/dist/index.js`);
  await jax.init(backend);
  jax.defaultDevice(backend);
  const np = jax.numpy;
  const t = {};
  for (const [name, v] of Object.entries({ ...row.inputs, ...row.constants })) t[name] = np.array(await fetched(v), { shape: v.shape });
  const operators = {
    matmul: jax.jit((x, w) => np.matmul(x, w)),
    softmax: jax.jit((x) => jax.nn.softmax(x, -1)),
    layernorm: jax.jit((x, s, b) => jax.nn.standardize(x, -1, { epsilon: 1e-5 }).mul(s).add(b)),
  };
  const names = { matmul: ["x", "w"], softmax: ["x"], layernorm: ["x", "s", "b"] }[row.operator];
  return { call: async () => operators[row.operator](...names.map((n) => t[n].ref)).data(), close: () => Object.values(t).forEach((v) => v.dispose()), info: {} };
}

const RUNTIMES = { luthier, onnxruntime, tensorflow, jaxjs };

/** The largest difference to the expected result over its largest magnitude. */
async function difference(row, got) {
  const want = await fetched(row.expected);
  if (got.length !== want.length) return Infinity;
  let gap = 0;
  let scale = 1e-30;
  for (let i = 0; i < want.length; i++) {
    gap = Math.max(gap, Math.abs(Number(got[i]) - Number(want[i])));
    scale = Math.max(scale, Math.abs(Number(want[i])));
    if (Number.isNaN(Number(got[i]))) return Infinity;
  }
  return gap / scale;
}

/** Makes a runtime ready for a row: {error, load_ms, first_ms, info} or {failed}. */
export async function setup({ runtime, options, row }) {
  try {
    const start = performance.now();
    current = await RUNTIMES[runtime](row, options);
    const loaded = performance.now();
    const data = await current.call();
    const first = performance.now();
    return { error: await difference(row, data), load_ms: loaded - start, first_ms: first - loaded, info: current.info };
  } catch (error) {
    current = null;
    return { failed: String(error.message || error).slice(0, 300) };
  }
}

/** Calls until `ms` have passed, at least `least`: milliseconds of each. */
export async function turn({ ms, least }) {
  const times = [];
  const end = performance.now() + ms;
  while (performance.now() < end || times.length < least) {
    const start = performance.now();
    await current.call();
    times.push(performance.now() - start);
  }
  return times;
}

export async function done() {
  if (current) await current.close();
  current = null;
}

/** What one call makes of the GPU (see gpu_hooks.js). */
export async function counted() {
  const { gpuCounters: c } = globalThis;
  const before = { ...c };
  await current.call();
  return { dispatches: c.dispatches - before.dispatches, bytes: c.bytes - before.bytes, submits: c.submits - before.submits, shaders: c.shaders, pipelines: c.pipelines };
}
