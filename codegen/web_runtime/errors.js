// Errors: each has a stable `code` and a `hint` that says what to do. They cross the boundary of a worker as plain data.

export class LuthierError extends Error {
  constructor(code, message, hint = "", details = {}) {
    super(hint ? `${message}; to do: ${hint}` : message);
    this.code = code;
    this.hint = hint;
    this.details = details;
  }
}

/** A wrong name, dtype, shape or value of an input, or a wrong option of a call. */
export class InputError extends LuthierError {}
/** A file of the package is missing, stalled, truncated or corrupted, or belongs to another build. */
export class PackageError extends LuthierError {}
/** The browser lacks something the code needs: WebAssembly SIMD, WebGPU, a limit, a feature. */
export class UnsupportedError extends LuthierError {}
/** Threads were required and the page is not cross-origin isolated. */
export class IsolationError extends LuthierError {}
/** The GPU device was lost and could not be had again. */
export class DeviceLostError extends LuthierError {}
/** Memory of the tab or of the GPU is exhausted. */
export class OutOfMemoryError extends LuthierError {}
/** The generated code failed: a defect. */
export class KernelError extends LuthierError {}
/** The model was closed, or its worker died. */
export class ClosedError extends LuthierError {}

const CLASSES = {
  LuthierError, InputError, PackageError, UnsupportedError, IsolationError, DeviceLostError, OutOfMemoryError, KernelError, ClosedError,
};
for (const [name, Class] of Object.entries(CLASSES)) Class.prototype.name = name; // a minifier renames classes, not these keys

/** An error as plain data, for postMessage. */
export function pack(error) {
  if (error instanceof LuthierError) {
    return { name: error.name, code: error.code, message: error.message, hint: error.hint, details: error.details };
  }
  if (error instanceof RangeError && /alloc|memory|length/i.test(error.message)) {
    return pack(new OutOfMemoryError("NO_MEMORY", `no memory for the call: ${error.message}`, "use smaller inputs, or read fewer outputs"));
  }
  const text = error && error.message ? `${error.name}: ${error.message}` : String(error);
  return { name: "KernelError", code: "INTERNAL", message: text, hint: "", details: { stack: String((error && error.stack) || "") } };
}

/** What `pack` made as an error again. */
export function unpack(data) {
  const Class = CLASSES[data.name] || LuthierError;
  const error = new Class(data.code, data.message, "", data.details || {});
  error.hint = data.hint;
  return error;
}

/** Anything thrown as a LuthierError. */
export function asLuthierError(error) {
  return error instanceof LuthierError ? error : unpack(pack(error));
}
