// From navigation to the first result, with nothing in the cache: the model as its runtime's documentation says to load it.

const job = await (await fetch(new URLSearchParams(location.search).get("job"))).json();
const { row, runtime, target, threads } = job;
const TYPES = { float32: Float32Array, int64: BigInt64Array };
const inputs = Object.entries(row.inputs).map(async ([name, t]) => [name, { data: new TYPES[t.dtype](await (await fetch(t.file)).arrayBuffer()), shape: t.shape, dtype: t.dtype }]);
let ready = 0;
try {
  if (runtime === "luthier") {
    const url = row.packages[target];
    const { load } = await import(`${url}index.js`);
    const model = await load(url, { threads });
    ready = performance.now();
    await model.run(Object.fromEntries(await Promise.all(inputs)));
  } else {
    const ort = await import(`/node_modules/onnxruntime-web/dist/${target === "webgpu" ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs"}`);
    ort.env.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
    ort.env.wasm.numThreads = threads;
    const session = await ort.InferenceSession.create(row.model, { executionProviders: [target] });
    ready = performance.now();
    const given = (await Promise.all(inputs)).map(([name, t]) => [name, new ort.Tensor(t.dtype, t.data, t.shape)]);
    await session.run(Object.fromEntries(given));
  }
} catch (error) {
  document.documentElement.dataset.failed = String(error.message || error);
}
const end = performance.now();
await new Promise((resolve) => setTimeout(resolve, 200)); // entries of long tasks come late
const result = { ms: end, ready_ms: ready, long_tasks: globalThis.longTasks, blocked_ms: Math.max(0, ...globalThis.longTasks), failed: document.documentElement.dataset.failed || "" };
const tag = document.createElement("pre");
tag.id = "result";
tag.textContent = JSON.stringify(result);
document.body.append(tag);
