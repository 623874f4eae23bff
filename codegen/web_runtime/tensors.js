// Element types by their ONNX codes, checks of inputs, packing of types below eight bits. Shapes and dtypes come from the manifest.

import { InputError } from "./errors.js";

const half = typeof Float16Array === "undefined" ? Uint16Array : Float16Array;

// code: [name, bits in memory, array type given and returned, another array type taken]
export const DTYPES = {
  1: ["float32", 32, Float32Array],
  2: ["uint8", 8, Uint8Array, Uint8ClampedArray],
  3: ["int8", 8, Int8Array],
  4: ["uint16", 16, Uint16Array],
  5: ["int16", 16, Int16Array],
  6: ["int32", 32, Int32Array],
  7: ["int64", 64, BigInt64Array],
  9: ["bool", 8, Uint8Array],
  10: ["float16", 16, half, Uint16Array],
  11: ["float64", 64, Float64Array],
  12: ["uint32", 32, Uint32Array],
  13: ["uint64", 64, BigUint64Array],
  16: ["bfloat16", 16, Uint16Array],
  17: ["float8_e4m3fn", 8, Uint8Array],
  18: ["float8_e4m3fnuz", 8, Uint8Array],
  19: ["float8_e5m2", 8, Uint8Array],
  20: ["float8_e5m2fnuz", 8, Uint8Array],
  21: ["uint4", 4, Uint8Array],
  22: ["int4", 4, Int8Array],
  23: ["float4_e2m1fn", 4, Uint8Array],
  24: ["float8_e8m0fnu", 8, Uint8Array],
  25: ["uint2", 2, Uint8Array],
  26: ["int2", 2, Int8Array],
};

export const dtypeName = (code) => DTYPES[code][0];
export const bitsOf = (code) => DTYPES[code][1];

/** Bytes of `count` elements in memory. */
export const byteSize = (code, count) => Math.ceil((count * DTYPES[code][1]) / 8);

export const product = (shape) => shape.reduce((a, b) => a * b, 1);

const isTyped = (value) => ArrayBuffer.isView(value) && value.BYTES_PER_ELEMENT > 0;
const bytesOf = (array) => new Uint8Array(array.buffer, array.byteOffset, array.byteLength);

/** Whether `array` may hold elements of type `code`: by its kind's name, so that arrays of another frame or test runner count. */
const holds = (code, array) => isTyped(array) && DTYPES[code].slice(2).some((Type) => array[Symbol.toStringTag] === Type.name);

/** What an error calls `value`. */
function kindOf(value) {
  if (value === null || value === undefined) return "missing";
  return typeof value === "object" ? Object.prototype.toString.call(value).slice(8, -1) : typeof value;
}

const describe = (port) => `${port.name}: ${dtypeName(port.code)}[${port.shape.join(", ")}]`;

/** The inputs as they are now, in arrays that do not show more than they need. Views of `memory`, the model's own, stay. */
export function snapshot(inputs, memory) {
  const copy = (v) => (isTyped(v) && !(memory && v.buffer === memory.buffer) ? v.slice() : v);
  const one = (v) => (isTyped(v) || v === null || typeof v !== "object" || v.data === undefined ? copy(v) : { data: copy(v.data), shape: v.shape || v.dims });
  return isTyped(inputs) ? inputs : Object.fromEntries(Object.entries(inputs).map(([name, v]) => [name, one(v)]));
}

/** The buffers of a snapshot. */
export const buffersOf = (inputs) => Object.values(inputs).map((v) => (isTyped(v) ? v : v && v.data)).filter(isTyped).map((v) => v.buffer);

/** Numbers in (nested) arrays as a typed array, and their shape. Raises InputError. */
function fromNumbers(port, value) {
  const [dtype, , Type] = DTYPES[port.code];
  const wrong = (code, why, hint = "") => new InputError(code, `input "${port.name}" ${why}`, hint, { name: port.name });
  if (/^(bfloat16|float8)/.test(dtype) || (dtype === "float16" && Type === Uint16Array)) {
    throw wrong("WRONG_DTYPE", `is ${kindOf(value)}, the model needs ${dtype}`, `pass a ${Type.name} of its bits`);
  }
  const shape = [];
  for (let v = value; Array.isArray(v); v = v[0]) shape.push(v.length);
  const flat = Array.isArray(value) ? value.flat(Infinity) : [value];
  const ragged = (v, depth) => (Array.isArray(v) ? v.length !== shape[depth] || v.some((w) => ragged(w, depth + 1)) : depth !== shape.length);
  if (ragged(value, 0)) throw wrong("WRONG_SHAPE", "has rows of different lengths", "give every row as many numbers");
  const data = new Type(flat.length);
  const wide = /int64$/.test(dtype);
  const span = 2 ** bitsOf(port.code);
  const lo = /^int/.test(dtype) ? -span / 2 : 0;
  const hi = dtype === "bool" ? 1 : lo + span - 1;
  flat.forEach((v, k) => {
    if (!["number", "bigint", "boolean"].includes(typeof v)) throw wrong("WRONG_DTYPE", `holds ${kindOf(v)}, the model needs ${dtype}`, "pass numbers");
    if (dtype.startsWith("float")) data[k] = Number(v);
    else {
      if (Number.isInteger(Number(v))) data[k] = wide ? BigInt(v) : Number(v);
      if (v < lo || v > hi || data[k] != v) throw wrong("OUT_OF_RANGE", `holds ${v}, which is no ${dtype}`);
    }
  });
  return { data, shape: shape.length > 1 ? shape : undefined };
}

/**
 * The inputs of a call in the manifest's order: [{data, shape}], data a typed array of `count` elements. Those named in `state` belong to
 * the model and are not given: data null. Optional ones that are left out come from `defaults` (a Defaults).
 * Raises InputError naming the input. Extents that occur in several places are compared by the generated code.
 */
export function checkInputs(allPorts, inputs, state = [], defaults = null) {
  const ports = allPorts.filter((p) => !state.includes(p.name));
  if (inputs === null || typeof inputs !== "object" || ArrayBuffer.isView(inputs)) {
    throw new InputError("INPUTS_NOT_AN_OBJECT", "run() takes an object of inputs by name", `pass {${ports.map((p) => p.name).join(", ")}}`);
  }
  const list = `the inputs are ${ports.map(describe).join("; ")}`;
  for (const name of Object.keys(inputs)) {
    if (!ports.some((p) => p.name === name)) throw new InputError("UNKNOWN_INPUT", `the model has no input "${name}"`, list, { name });
  }
  return allPorts.map((port) => {
    if (state.includes(port.name)) return { data: null, shape: port.shape };
    const value = inputs[port.name];
    if ((value === undefined || value === null) && port.default) return defaults.of(port);
    if (value === undefined || value === null) throw new InputError("MISSING_INPUT", `input "${port.name}" is missing`, list, { name: port.name });
    const bare = isTyped(value) || Array.isArray(value) || typeof value !== "object";
    let data = bare ? value : value.data;
    let given = bare ? undefined : value.shape || value.dims;
    if (["number", "bigint", "boolean"].includes(typeof data) || Array.isArray(data)) {
      const made = fromNumbers(port, data);
      data = made.data;
      given = given || made.shape;
    }
    if (!holds(port.code, data)) {
      const [name, , Type] = DTYPES[port.code];
      throw new InputError("WRONG_DTYPE", `input "${port.name}" is ${kindOf(data === undefined ? value : data)}, the model needs ${name}`, `pass a ${Type.name}`, { name: port.name });
    }
    const shape = given === undefined ? inferShape(port, data.length) : checkShape(port, Array.from(given, Number), data.length);
    return { data, shape };
  });
}

const isStatic = (extent) => typeof extent === "number" || /^[0-9]+$/.test(extent);

function inferShape(port, length) {
  const open = port.shape.flatMap((e, axis) => (isStatic(e) ? [] : [axis]));
  const rest = product(port.shape.filter(isStatic).map(Number));
  if (open.length > 1) {
    throw new InputError("SHAPE_NEEDED", `input "${port.name}" has several open extents: [${port.shape.join(", ")}]`, "pass {data, shape: [...]}", { name: port.name });
  }
  const shape = port.shape.map((e, axis) => (axis === open[0] ? length / rest : Number(e)));
  if (open.length ? rest === 0 || length % rest !== 0 : rest !== length) {
    throw new InputError("WRONG_SHAPE", `input "${port.name}" has ${length} elements, the model needs [${port.shape.join(", ")}]`, "", { name: port.name });
  }
  return shape;
}

function checkShape(port, shape, length) {
  const wrong = (why) => new InputError("WRONG_SHAPE", `input "${port.name}" has shape [${shape.join(", ")}], the model needs [${port.shape.join(", ")}]${why}`, "", { name: port.name });
  if (shape.length !== port.shape.length) throw wrong(`: rank ${port.shape.length}`);
  shape.forEach((n, axis) => {
    if (!Number.isInteger(n) || n < 0) throw wrong(`: extent ${axis} is no count`);
    if (isStatic(port.shape[axis]) && Number(port.shape[axis]) !== n) throw wrong(`: extent ${axis}`);
  });
  if (product(shape) !== length) throw wrong(`: the array has ${length} elements`);
  return shape;
}

/** The bytes of a checked input as they lie in memory. */
export function toBytes(code, data) {
  const bits = bitsOf(code);
  const raw = bytesOf(data);
  if (bits >= 8) return raw;
  const per = 8 / bits;
  const mask = (1 << bits) - 1;
  const out = new Uint8Array(Math.ceil(raw.length / per));
  for (let i = 0; i < raw.length; i++) out[Math.floor(i / per)] |= (raw[i] & mask) << ((i % per) * bits);
  return out;
}

/** A typed array over `count` elements of an input in `buffer`; null for types below eight bits, which are packed there. */
export const viewOf = (code, buffer, address, count) => (bitsOf(code) < 8 ? null : new DTYPES[code][2](buffer, address, count));

/** The extents of every input of a call to come: those of the model, or of `shapes` by name. Raises InputError. */
export function knownShapes(ports, shapes) {
  const unknown = Object.keys(shapes).find((name) => !ports.some((p) => p.name === name));
  if (unknown !== undefined) throw new InputError("UNKNOWN_INPUT", `the model has no input "${unknown}"`, `the inputs are ${ports.map(describe).join("; ")}`, { name: unknown });
  return ports.map((port) => {
    if (!shapes[port.name] && !port.shape.every(isStatic)) {
      throw new InputError("SHAPE_NEEDED", `input "${port.name}" has open extents: [${port.shape.join(", ")}]`, `pass {${port.name}: [...]}`, { name: port.name });
    }
    const shape = Array.from(shapes[port.name] || port.shape, Number);
    return { shape: checkShape(port, shape, product(shape)) };
  });
}

/** The data of `tensor` in an array of the caller's. Raises InputError. */
export function fill(array, tensor, name) {
  const code = Object.keys(DTYPES).find((c) => DTYPES[c][0] === tensor.dtype);
  if (!holds(code, array)) throw new InputError("WRONG_DTYPE", `into: output "${name}" is ${tensor.dtype}`, `pass a ${DTYPES[code][2].name}`, { name });
  if (array.length !== tensor.data.length) throw new InputError("WRONG_SHAPE", `into: output "${name}" has ${tensor.data.length} elements, the array ${array.length}`, "", { name });
  bytesOf(array).set(bytesOf(tensor.data));
}

/** A tensor {dtype, shape, data} from bytes in memory; the data is a copy of its own, or is put `into` an array that fits. */
export function fromBytes(code, shape, bytes, into) {
  const [dtype, bits, Type] = DTYPES[code];
  const count = product(shape);
  if (bits >= 8 && holds(code, into) && into.length === count) {
    bytesOf(into).set(bytes.subarray(0, byteSize(code, count)));
    return { dtype, shape, data: into };
  }
  const own = bytes.slice(0, byteSize(code, count)); // never shared, even where the memory is
  if (bits >= 8) return { dtype, shape, data: new Type(own.buffer, 0, count) };
  const per = 8 / bits;
  const data = new Type(count);
  for (let i = 0; i < count; i++) {
    const v = (own[Math.floor(i / per)] >> ((i % per) * bits)) & ((1 << bits) - 1);
    data[i] = Type === Int8Array && v >= 1 << (bits - 1) ? v - (1 << bits) : v;
  }
  return { dtype, shape, data };
}

/** What optional inputs are in a call that leaves them out, gathered from the blob of weights as it arrives. */
export class Defaults {
  constructor(ports) {
    this.parts = ports.filter((p) => p.default && p.default !== "random").map((p) => ({ name: p.name, offset: p.default.offset, raw: new Uint8Array(p.default.bytes) }));
  }

  take(offset, bytes) {
    for (const { offset: start, raw } of this.parts) {
      const lo = Math.max(offset, start);
      const hi = Math.min(offset + bytes.length, start + raw.length);
      if (lo < hi) raw.set(bytes.subarray(lo - offset, hi - offset), lo - start);
    }
  }

  of(port) {
    if (port.default === "random") return { data: globalThis.crypto.getRandomValues(new Uint32Array(2)), shape: [2] };
    const { raw } = this.parts.find((p) => p.name === port.name);
    const { data, shape } = fromBytes(port.code, port.default.shape, raw);
    return { data, shape };
  }
}

/** Which outputs a call wants: indices. Raises InputError for a name the model does not have. */
export function chooseOutputs(ports, names) {
  if (names === undefined || names === null) return ports.map((_, j) => j);
  return Array.from(names, (name) => {
    const j = ports.findIndex((p) => p.name === name);
    if (j < 0) throw new InputError("UNKNOWN_OUTPUT", `the model has no output "${name}"`, `the outputs are ${ports.map((p) => p.name).join(", ")}`, { name });
    return j;
  });
}
