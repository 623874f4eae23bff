// The demo page: loads the model beside it, runs it on made-up inputs, shows shapes, values and times.

import { load } from "../index.js";

const $ = (id) => document.getElementById(id);
const isOpen = (extent) => typeof extent !== "number";
const ARRAYS = { float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array, bool: Uint8Array, float16: globalThis.Float16Array || Uint16Array, bfloat16: Uint16Array };

function row(cells) {
  const tr = document.createElement("tr");
  for (const text of cells) {
    const td = document.createElement("td");
    td.textContent = text;
    tr.append(td);
  }
  return tr;
}

/** Extents such as "n" or "2*n" for values of the names; 1 where that cannot be told. */
function extent(e, values) {
  if (!isOpen(e)) return e;
  return String(e).split("*").reduce((n, part) => n * (values[part.trim()] || Number(part) || 1), 1);
}

const KINDS = [
  [/mask/i, "ones", () => 1],
  [/type/i, "zeros", () => 0],
];

function filler(input) {
  if (/^(u?int|bool)/.test(input.dtype)) {
    const known = KINDS.find(([pattern]) => pattern.test(input.name));
    if (input.dtype === "bool") return ["zeros", () => 0];
    return known ? known.slice(1) : ["random, 0 to 99", () => Math.floor(Math.random() * 100)];
  }
  if (/^float(32|64)/.test(input.dtype)) return ["random, -1 to 1", () => Math.random() * 2 - 1];
  return ["zeros", () => 0];
}

function make(input, values) {
  const shape = input.shape.map((e) => extent(e, values));
  const count = shape.reduce((a, b) => a * b, 1);
  const Type = ARRAYS[input.dtype] || Uint8Array;
  const [, value] = filler(input);
  const wide = Type === BigInt64Array || Type === BigUint64Array;
  return { data: Type.from({ length: count }, () => (wide ? BigInt(value()) : value())), shape };
}

function show(error) {
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error;
}

function first(t) {
  const text = Array.from(t.data.subarray(0, 8), (v) => (typeof v === "number" && !Number.isInteger(v) ? v.toPrecision(5) : String(v)));
  return text.join(", ") + (t.data.length > 8 ? ", …" : "");
}

const start = performance.now();
try {
  const query = new URLSearchParams(location.search);
  const threads = Number(query.get("threads")) || undefined;
  const model = await load(new URL("../", import.meta.url), {
    threads,
    onProgress({ loaded, total }) {
      $("progress").value = total ? loaded / total : 0;
      $("status").textContent = `Loading: ${(loaded / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`;
    },
  });
  document.title = model.name;
  $("name").textContent = model.name;
  const { backend, variant, threads: used, adapter, warnings } = model.info;
  const parts = [backend, variant, used && `${used} thread${used > 1 ? "s" : ""}`, adapter, ...warnings].filter(Boolean);
  $("status").textContent = `Loaded in ${((performance.now() - start) / 1e3).toFixed(2)} s: ${parts.join(", ")}`;
  $("progress").hidden = true;
  const names = new Map(); // of open extents, with the values to start with: one thing at a time, sequences of sixteen, images of 224
  const needed = model.inputs.filter((i) => !i.optional);
  for (const input of needed) {
    const image = input.shape.length === 4 && input.shape.slice(1).filter(isOpen).length > 1;
    input.shape.forEach((e, axis) => {
      for (const part of isOpen(e) ? String(e).split("*") : []) {
        const name = part.trim();
        if (!Number(name) && !names.has(name)) names.set(name, axis === 0 ? 1 : image ? 224 : 16);
      }
    });
    $("inputs").append(row([input.name, input.dtype, `[${input.shape.join(", ")}]`, filler(input)[0]]));
  }
  for (const [name, start] of names) {
    const label = document.createElement("label");
    const field = document.createElement("input");
    Object.assign(field, { type: "number", min: 0, value: query.get(name) || start, name });
    label.append(`${name} `, field);
    $("dims").append(label);
  }
  $("form").hidden = false;
  /** Whether it ran. */
  const run = async () => {
    show(null);
    const values = Object.fromEntries([...$("dims").querySelectorAll("input")].map((f) => [f.name, Number(f.value)]));
    const button = $("form").querySelector("button");
    button.disabled = true;
    try {
      const inputs = Object.fromEntries(needed.map((i) => [i.name, make(i, values)]));
      const times = [];
      let outputs;
      for (let k = 0; k < Number($("times").value); k++) {
        const begin = performance.now();
        outputs = await model.run(inputs);
        times.push(performance.now() - begin);
      }
      times.sort((a, b) => a - b);
      $("timing").textContent = `Outputs, ${times.length === 1 ? "" : "median "}${times[times.length >> 1].toFixed(2)} ms`;
      $("outputs").replaceChildren(...Object.entries(outputs).map(([name, t]) => row([name, t.dtype, `[${t.shape.join(", ")}]`, first(t)])));
      $("results").hidden = false;
      return true;
    } catch (error) {
      show(error);
      return false;
    } finally {
      button.disabled = false;
    }
  };
  $("form").addEventListener("submit", (e) => {
    e.preventDefault();
    run();
  });
  document.documentElement.dataset.state = "loaded";
  const fields = [...$("dims").querySelectorAll("input")].filter((f) => !query.get(f.name) && Number(f.value) > 1);
  const starts = fields.map((f) => f.value);
  for (const size of [0, 256, 64, 32, 8, 1, 0]) {
    fields.forEach((field, k) => (field.value = size || starts[k]));
    if ((await run()) || !fields.length) break; // a model may take some extents only
  }
  document.documentElement.dataset.state = "ran";
} catch (error) {
  $("status").textContent = "Not loaded";
  $("progress").hidden = true;
  show(error);
  document.documentElement.dataset.state = "failed";
}
