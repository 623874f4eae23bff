// Loads the manifest and starts the engine; `target.js` names the engine of the package's target.

import { Files } from "./files.js";
import { Engine } from "./target.js";

/** What a Model tells of its manifest. */
export function describe({ inputs, outputs, name, language, files }) {
  if (!language) return { inputs, outputs, name };
  const given = inputs.filter((p) => !language.state.includes(p.name));
  return { inputs: given, outputs, name, language: { ...language, tokenizer: files["tokenizer.json"] } };
}

/**
 * An engine with run(inputs, outputs), close() and info. `onProgress({loaded, total})` counts bytes.
 * Options: threads, requireThreads, variant (wasm), stall (milliseconds), signal.
 */
export async function openEngine(places, id, options, onProgress) {
  const files = new Files(places, options);
  let manifest = await files.json("manifest.json");
  if (id && (!manifest.web || manifest.web.id !== id)) manifest = await files.json("manifest.json", true); // an old copy in a cache
  if (!manifest.web) throw files.fail("FILE_CORRUPTED", "manifest.json", "describes no web package", "compile the model for wasm or webgpu");
  if (id && manifest.web.id !== id) {
    throw files.fail("OTHER_BUILD", "manifest.json", `belongs to build ${manifest.web.id}, this code to ${id}`, "upload code and weights of the same build, and empty caches");
  }
  const total = manifest.web.shards.reduce((n, s) => n + s.bytes, 0) + (manifest.web.code_bytes || 0);
  let loaded = 0;
  const onBytes = (n) => {
    loaded += n;
    onProgress({ loaded, total: Math.max(total, loaded) });
  };
  const engine = await Engine.load(manifest, files, options, onBytes);
  onProgress({ loaded: Math.max(total, loaded), total: Math.max(total, loaded) });
  return { engine, manifest };
}
