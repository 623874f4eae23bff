// What differs between a page, a worker and Node: files, workers, isolation.

export const isNode = typeof process === "object" && process !== null && !!(process.versions && process.versions.node) && typeof document === "undefined";
export const isPage = typeof document !== "undefined";

/** Whether memory can be shared with workers here. */
export const canShare = () => typeof SharedArrayBuffer !== "undefined" && (isNode || globalThis.crossOriginIsolated === true);

/** Whether this thread may sleep in Atomics.wait. */
export const mayWait = () => !isPage;

export const cores = () => (typeof navigator === "object" && navigator && navigator.hardwareConcurrency) || 1;

const node = (name) => import(/* @vite-ignore */ /* webpackIgnore: true */ `node:${name}`);

/** A file as {status, length, chunks, cancel}: `chunks` yields Uint8Arrays. Status 404 for a file that is not there; throws on failure. */
export async function openFile(url, { signal, reload = false } = {}) {
  if (isNode && url.protocol === "file:") {
    const { open } = await node("fs/promises");
    let handle;
    try {
      handle = await open(url, "r");
    } catch (error) {
      if (error.code === "ENOENT" || error.code === "ENOTDIR") return { status: 404 };
      throw error;
    }
    const { size } = await handle.stat();
    async function* chunks() {
      try {
        const step = 4 << 20;
        for (let at = 0; at < size; ) {
          const buffer = new Uint8Array(Math.min(step, size - at));
          const { bytesRead } = await handle.read(buffer, 0, buffer.length, at);
          if (bytesRead === 0) return;
          at += bytesRead;
          yield buffer.subarray(0, bytesRead);
        }
      } finally {
        await handle.close();
      }
    }
    return { status: 200, chunks: chunks(), cancel: () => handle.close().catch(() => undefined) };
  }
  const response = await fetch(url, { signal, cache: reload ? "reload" : "default" });
  if (!response.ok || !response.body) return { status: response.status };
  const reader = response.body.getReader();
  async function* chunks() {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  }
  return { status: 200, type: response.headers.get("content-type") || "", chunks: chunks(), cancel: () => reader.cancel().catch(() => undefined) };
}

/** A module worker with one shape on all platforms: post, onMessage, onError, terminate. */
export async function openWorker(url, name) {
  if (isNode) {
    const { Worker: NodeWorker } = await node("worker_threads");
    const worker = new NodeWorker(url, { name });
    worker.unref();
    return {
      post: (data, transfer) => worker.postMessage(data, transfer),
      onMessage: (f) => worker.on("message", f),
      onError: (f) => worker.on("error", f),
      hold: (on) => (on ? worker.ref() : worker.unref()),
      terminate: () => worker.terminate(),
    };
  }
  const worker = new Worker(url, { type: "module", name });
  return {
    post: (data, transfer) => worker.postMessage(data, transfer || []),
    onMessage: (f) => worker.addEventListener("message", (e) => f(e.data)),
    onError: (f) => {
      worker.addEventListener("error", (e) => f(new Error(e.message || `cannot start ${url}`)));
      worker.addEventListener("messageerror", () => f(new Error("a message could not be read")));
    },
    hold: () => undefined,
    terminate: () => worker.terminate(),
  };
}

/** The worker's side of openWorker. */
export async function parentPort() {
  if (isNode) {
    const { parentPort: port } = await node("worker_threads");
    return { post: (data, transfer) => port.postMessage(data, transfer), onMessage: (f) => port.on("message", f) };
  }
  return { post: (data, transfer) => self.postMessage(data, transfer || []), onMessage: (f) => self.addEventListener("message", (e) => f(e.data)) };
}
