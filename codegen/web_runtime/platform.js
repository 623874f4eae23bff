// What differs between a page, a worker and Node: files, workers, isolation, policies.

const versions = (typeof process === "object" && process && process.versions) || {};

/** Node or Deno, also where a test runner defines `document`; not the pages of Electron and NW.js. */
export const isNode = Boolean(versions.node) && process.type !== "renderer" && !versions.nw;
export const isPage = !isNode && typeof document !== "undefined";

/** Whether memory can be shared with workers here. */
export const canShare = () => typeof SharedArrayBuffer !== "undefined" && (isNode || globalThis.crossOriginIsolated === true);

/** Whether this thread can start workers: service workers and extension backgrounds cannot. */
export const hasWorkers = isNode || typeof Worker !== "undefined";

/** Whether this thread may sleep in Atomics.wait. */
export const mayWait = () => !isPage && typeof ServiceWorkerGlobalScope === "undefined";

// a service worker refuses every import(): it stays out of all ways that code takes there
const node = (name) => import(/* @vite-ignore */ /* webpackIgnore: true */ `node:${name}`);

export async function cores() {
  const known = globalThis.navigator && globalThis.navigator.hardwareConcurrency;
  return known || (isNode ? (await node("os")).availableParallelism() : 1);
}

/** UTF-8 to a string; some test runners hide TextDecoder. */
export async function textOf(bytes) {
  const Decoder = typeof TextDecoder === "undefined" ? (await node("util")).TextDecoder : TextDecoder;
  return new Decoder().decode(bytes);
}

/** What `url` means here: relative to the page, in Node to the current folder. */
export const resolve = (url) => new URL(url, isNode ? `file://${process.cwd()}/` : globalThis.location.href);

const violations = []; // [directive, time]
if (!isNode && globalThis.addEventListener) globalThis.addEventListener("securitypolicyviolation", (e) => violations.push([e.effectiveDirective, performance.now()]));

/** The directive of the page's policy, one of `names`, that has refused something since the time `start`; empty for none. */
export async function refusedBy(start, ...names) {
  if (isNode) return "";
  await new Promise((done) => setTimeout(done, 20)); // the event comes after the failure
  const [directive = ""] = violations.find(([found, time]) => time >= start && names.some((name) => found.startsWith(name))) || [];
  return directive;
}

/** A file as {status, length, chunks, cancel}: `chunks` yields Uint8Arrays. Status 404 for a file that is not there; throws on failure. */
export async function openFile(url, { signal, reload = false } = {}) {
  if (isNode && url.protocol === "file:") {
    const { open } = await node("fs/promises");
    let handle;
    try {
      handle = await open((await node("url")).fileURLToPath(url.href), "r");
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

const wrap = (worker, url) => ({
  post: (data, transfer) => worker.postMessage(data, transfer || []),
  onMessage: (f) => worker.addEventListener("message", (e) => f(e.data)),
  onError: (f) => {
    worker.addEventListener("error", (e) => f(new Error(e.message || `cannot start ${url}`)));
    worker.addEventListener("messageerror", () => f(new Error("a message could not be read")));
  },
  hold: () => undefined,
  terminate: () => worker.terminate(),
});

async function wrapNode(url) {
  const { Worker: NodeWorker } = await node("worker_threads");
  const { fileURLToPath } = await node("url");
  const worker = new NodeWorker(fileURLToPath(String(url)));
  worker.unref();
  return {
    post: (data, transfer) => worker.postMessage(data, transfer),
    onMessage: (f) => worker.on("message", f),
    onError: (f) => worker.on("error", f),
    hold: (on) => (on ? worker.ref() : worker.unref()),
    terminate: () => worker.terminate(),
  };
}

/** The address in `literal`, which a bundler may have rewritten; no worker is made. */
function addressOf(literal) {
  const own = Object.getOwnPropertyDescriptor(globalThis, "Worker");
  let address;
  const note = function (url) {
    address = url;
  };
  Object.defineProperty(globalThis, "Worker", { value: note, configurable: true, writable: true });
  try {
    literal();
  } finally {
    if (own) Object.defineProperty(globalThis, "Worker", own);
    else delete globalThis.Worker;
  }
  return new URL(String(address));
}

const isForeign = (url) => Boolean(globalThis.location) && url.origin !== globalThis.location.origin;
let policy; // of Trusted Types: one for the whole life of the page

/** Makes a worker of `url` where `new Worker(url)` itself is refused: by Trusted Types, or because the code is another origin's. */
function made(url) {
  const script = isForeign(url) ? URL.createObjectURL(new Blob([`import ${JSON.stringify(url.href)};`], { type: "text/javascript" })) : url.href;
  if (globalThis.trustedTypes) policy = policy || globalThis.trustedTypes.createPolicy("luthier", { createScriptURL: (s) => s });
  return wrap(new Worker(policy ? policy.createScriptURL(script) : script, { type: "module" }), url);
}

async function started(worker, milliseconds) {
  let timer;
  try {
    await new Promise((done, failed) => {
      timer = setTimeout(() => failed(new Error(`no answer within ${milliseconds / 1000} s`)), milliseconds);
      worker.onMessage((m) => m.up && done());
      worker.onError(failed);
    });
  } catch (error) {
    worker.terminate();
    throw error;
  } finally {
    clearTimeout(timer);
  }
  return worker;
}

/**
 * A module worker that has posted {up: true}, with one shape on all platforms: post, onMessage, onError, hold, terminate. `literal`: a function
 * with the words `new Worker(new URL("./file", import.meta.url), { type: "module" })`, by which bundlers find the file; `beside`: its address
 * where code was copied, for bundlers that do not. Raises an Error that says why, and which policy forbids it.
 */
export async function openWorker(literal, beside, milliseconds = 20000) {
  if (!hasWorkers) throw new Error("there are no workers in this place");
  const start = performance.now();
  const own = addressOf(literal);
  if (isNode) return started(await wrapNode(own), milliseconds);
  const ways = [() => wrap(literal(), own)];
  if (isForeign(own) || globalThis.trustedTypes) ways.push(() => made(own));
  if (beside && beside.href !== own.href) {
    const moved = own.pathname.endsWith("/worker.js") && !own.pathname.endsWith("/runtime/worker.js"); // bundled, and nobody rewrote the address
    ways.splice(moved ? 0 : ways.length, 0, () => made(beside));
  }
  let last;
  for (const way of ways) {
    try {
      return await started(way(), milliseconds);
    } catch (error) {
      last = last || error;
    }
  }
  const directive = await refusedBy(start, "worker-src", "child-src", "script-src", "require-trusted-types-for", "trusted-types");
  throw directive ? new Error(`refused by the Content-Security-Policy: ${directive}`) : last;
}

/** The worker's side of openWorker. */
export async function parentPort() {
  if (isNode) {
    const { parentPort: port } = await node("worker_threads");
    return { post: (data, transfer) => port.postMessage(data, transfer), onMessage: (f) => port.on("message", f) };
  }
  return { post: (data, transfer) => self.postMessage(data, transfer || []), onMessage: (f) => self.addEventListener("message", (e) => f(e.data)) };
}
