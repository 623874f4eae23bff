// Which shaders does Dawn (Tint) accept? stdin: [{name, source}]; stdout: [{name, error | null}].
import { pathToFileURL } from 'node:url';
import { readFileSync } from 'node:fs';

const { create } = await import(pathToFileURL(process.argv[2]).href);
// the null backend needs no driver: the shader is parsed, validated and lowered, nothing is drawn
globalThis.gpu = create(['backend=null']); // kept: Dawn dies with the object, while the device is still in use
globalThis.adapter = await globalThis.gpu.requestAdapter();
const requiredFeatures = ["shader-f16", "subgroups"].filter((f) => globalThis.adapter.features.has(f));
const device = (globalThis.device = await globalThis.adapter.requestDevice({ requiredFeatures }));
const out = [];
for (const { name, source } of JSON.parse(readFileSync(0, 'utf8'))) {
  device.pushErrorScope('validation');
  const module = device.createShaderModule({ code: source });
  device.createComputePipeline({ layout: 'auto', compute: { module, entryPoint: 'main' } });
  const info = await module.getCompilationInfo();
  const err = await device.popErrorScope();
  const msgs = info.messages.filter((m) => m.type === 'error').map((m) => `${m.lineNum}:${m.linePos} ${m.message}`);
  out.push({ name, error: msgs.length ? msgs.join('\n') : err ? err.message : null });
}
process.stdout.write(JSON.stringify(out), () => process.exit(0));
