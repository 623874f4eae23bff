// Times artifacts of the wasm target under Node (V8): node benchmarks/wasm_node.mjs RUNS VARIANT[,THREADS] FOLDER...
// Prints one JSON line a folder: least and middle time of a call in ms, and a checksum of the first output.
import { readFileSync } from "node:fs";
import { Worker, isMainThread, workerData } from "node:worker_threads";

const PAGE = 65536, RECORD = 48, EXTENTS = 16;
const WIDTH = { 1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2 };

if (!isMainThread) {
  const { module, memory, number } = workerData;
  new WebAssembly.Instance(module, { env: { memory } }).exports.lt_worker(number);
  process.exit(0);
}

const [runsText, variantText, ...folders] = process.argv.slice(2);
const runs = Number(runsText);
const [variant, threadsText] = variantText.split(",");
const threads = Number(threadsText ?? 1);

for (const folder of folders) {
  const manifest = JSON.parse(readFileSync(`${folder}/manifest.json`, "utf8"));
  const spec = manifest.wasm;
  const module = new WebAssembly.Module(readFileSync(`${folder}/model.${variant}.wasm`));
  const shared = variant.endsWith("threads");
  const memory = new WebAssembly.Memory(shared ? { initial: spec.pages, maximum: spec.max_pages, shared } : { initial: spec.pages });
  const { lt_bind, lt_run } = new WebAssembly.Instance(module, { env: { memory } }).exports;
  const weights = readFileSync(`${folder}/weights.bin`);
  new Uint8Array(memory.buffer).set(weights.subarray(0, manifest.weights_bytes), spec.weights);
  const workers = [];
  for (let k = 1; shared && k < threads; k++) workers.push(new Worker(new URL(import.meta.url), { workerData: { module, memory, number: k } }));
  const shapes = JSON.parse(readFileSync(`${folder}/shapes.json`, "utf8"));
  manifest.inputs.forEach((input, j) => {
    new Int32Array(memory.buffer, spec.io + RECORD * j + EXTENTS, 8).set(shapes[input.name]);
  });
  let status = lt_bind(threads);
  if (status) throw new Error(`lt_bind: ${status}`);
  manifest.inputs.forEach((input, j) => {
    const [at, bytes] = new Uint32Array(memory.buffer, spec.io + RECORD * j, 2);
    const data = readFileSync(`${folder}/input-${j}.bin`);
    if (data.length !== bytes) throw new Error(`${input.name}: ${data.length} bytes given, ${bytes} needed`);
    new Uint8Array(memory.buffer).set(data, at);
  });
  const times = [];
  for (let k = 0; k < runs + 3; k++) {
    const t0 = performance.now();
    status = lt_run(threads, 1);
    times.push(performance.now() - t0);
    if (status) throw new Error(`lt_run: ${status}`);
  }
  const sorted = times.slice(3).sort((a, b) => a - b);
  const base = spec.io + RECORD * manifest.inputs.length;
  const [at, bytes] = new Uint32Array(memory.buffer, base, 2);
  let sum = 0;
  if (manifest.outputs[0].code === 1) for (const x of new Float32Array(memory.buffer, at, bytes / WIDTH[1])) sum += x;
  console.log(JSON.stringify({ folder, least: sorted[0], middle: sorted[sorted.length >> 1], sum, megabytes: memory.buffer.byteLength / PAGE / 16 }));
  for (const w of workers) await w.terminate();
}
process.exit(0);
