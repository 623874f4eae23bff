// Files of a package: fetched with progress, checked against the manifest, streamed to where they belong.

import { PackageError } from "./errors.js";
import { openFile, refusedBy, textOf } from "./platform.js";
import { sha256 } from "./sha256.js";

const PARALLEL = 4;
const PIECE = 1 << 20; // the weights are handed on in pieces of about this many bytes
const RETRIES = 1;

/** Reads the files of `places`: {base} for those below a folder, or {files: {name: address}}, which a bundler filled in. `stall`: milliseconds without a byte after which a download counts as failed. */
export class Files {
  constructor(places, { signal, stall = 60000 } = {}) {
    this.places = places;
    this.signal = signal;
    this.stall = stall;
  }

  url(name) {
    const { base, files } = this.places;
    return new URL(files ? files[name] : name, base);
  }

  fail(code, name, why, hint) {
    return new PackageError(code, `${this.url(name).href} ${why}`, hint, { file: name });
  }

  /** The chunks of a file, each within `stall` milliseconds of the one before. Raises PackageError. */
  async *chunks(name, reload = false) {
    const control = new AbortController();
    const stop = () => control.abort();
    if (this.signal) this.signal.addEventListener("abort", stop);
    const start = performance.now();
    let file;
    try {
      file = await this.within(openFile(this.url(name), { signal: control.signal, reload }), name);
      if (file.status !== 200) {
        throw this.fail("FILE_MISSING", name, `is missing (status ${file.status})`, "upload the whole folder that luthier compile wrote; beside a bundle, name its address: load(\"model/\")");
      }
      for (;;) {
        const { done, value } = await this.within(file.chunks.next(), name);
        if (done) return;
        yield value;
      }
    } catch (error) {
      if (file && file.cancel) file.cancel();
      if (error instanceof PackageError) throw error;
      if (this.signal && this.signal.aborted) throw new PackageError("ABORTED", "loading was aborted");
      const directive = await refusedBy(start, "connect-src", "default-src");
      if (directive) throw this.fail("FILE_UNREACHABLE", name, `is refused by the Content-Security-Policy: ${directive}`, "allow the address there");
      const hint = this.url(name).protocol === "file:" ? "serve the folder over http, for instance with: luthier serve FOLDER" : "check the network and the server's CORS headers";
      throw this.fail("FILE_UNREACHABLE", name, `cannot be fetched (${error.message})`, hint);
    } finally {
      control.abort();
      if (this.signal) this.signal.removeEventListener("abort", stop);
    }
  }

  within(promise, name) {
    let timer;
    const late = new Promise((_, reject) => {
      timer = setTimeout(() => reject(this.fail("FILE_STALLED", name, `sent nothing for ${this.stall / 1000} s`, "check the network, or raise the option stall")), this.stall);
    });
    return Promise.race([promise, late]).finally(() => clearTimeout(timer));
  }

  /** A whole file whose size is not known beforehand: Uint8Array. */
  async bytes(name, reload = false) {
    const parts = [];
    let size = 0;
    for await (const part of this.chunks(name, reload)) {
      parts.push(part);
      size += part.length;
    }
    const all = new Uint8Array(size);
    let at = 0;
    for (const part of parts) {
      all.set(part, at);
      at += part.length;
    }
    return all;
  }

  async json(name, reload = false) {
    const text = await textOf(await this.bytes(name, reload));
    try {
      return JSON.parse(text);
    } catch {
      throw this.fail("FILE_CORRUPTED", name, "is no JSON", "upload the folder again; a server that answers with its start page sends this, too");
    }
  }

  /** A file listed in the manifest, checked: {bytes, sha256}. */
  async checked(name, want, onBytes = () => undefined) {
    for (let round = 0; ; round++) {
      let got = 0;
      try {
        const all = new Uint8Array(want.bytes);
        for await (const part of this.chunks(name, round > 0)) {
          if (got + part.length > want.bytes) throw this.corrupted(name, `is longer than ${want.bytes} bytes`);
          all.set(part, got);
          got += part.length;
          onBytes(part.length, all, got);
        }
        if (got !== want.bytes) throw this.corrupted(name, `has ${got} bytes instead of ${want.bytes}`);
        if ((await sha256(all)) !== want.sha256) throw this.corrupted(name, "differs from its checksum");
        return all;
      } catch (error) {
        onBytes(-got, null, 0);
        if (round >= RETRIES || error.code === "FILE_MISSING" || error.code === "ABORTED" || error.code === "FILE_STALLED") throw error;
      }
    }
  }

  corrupted(name, why) {
    return this.fail("FILE_CORRUPTED", name, why, "upload the folder again, and see that nothing on the way changes it");
  }

  /**
   * All shards, some at a time. `sink(offset, bytes)` gets pieces of the blob as they arrive, in any order, at offsets that are
   * multiples of 4 (only the end of the blob may have another length); a shard that turns out corrupted is sent again.
   */
  async shards(shards, sink, onBytes = () => undefined) {
    const queue = [...shards];
    const failed = new AbortController();
    const one = async (shard) => {
      let sent = 0;
      await this.checked(shard.file, shard, (n, all, got) => {
        if (all === null) sent = 0;
        else if (got - sent >= PIECE || got === shard.bytes) {
          const end = got === shard.bytes ? got : got - (got % 4);
          sink(shard.offset + sent, all.subarray(sent, end));
          sent = end;
        }
        onBytes(n);
      });
    };
    const lane = async () => {
      for (let shard = queue.shift(); shard && !failed.signal.aborted; shard = queue.shift()) {
        try {
          await one(shard);
        } catch (error) {
          failed.abort();
          throw error;
        }
      }
    };
    await Promise.all(Array.from({ length: Math.min(PARALLEL, shards.length) }, lane));
  }
}
