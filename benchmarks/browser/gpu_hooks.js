// Counts what a page does with WebGPU: dispatches, the bytes that they are bound to, submits, distinct shaders. A script of the page.

(() => {
  const c = (globalThis.gpuCounters = { dispatches: 0, bytes: 0, submits: 0, shaders: 0, pipelines: 0 });
  if (typeof GPUDevice === "undefined") return;
  const texts = new Set();
  const sizes = new WeakMap();
  const bound = new WeakMap();
  const wrap = (Class, name, before, after) => {
    const original = Class.prototype[name];
    Class.prototype[name] = function (...args) {
      if (before) before(this, args);
      const result = original.apply(this, args);
      if (after) after(result, args);
      return result;
    };
  };
  wrap(GPUDevice, "createShaderModule", (_, [d]) => {
    texts.add(d.code);
    c.shaders = texts.size;
  });
  for (const name of ["createComputePipeline", "createComputePipelineAsync"]) wrap(GPUDevice, name, () => c.pipelines++);
  wrap(GPUDevice, "createBindGroup", null, (group, [d]) => {
    let total = 0;
    for (const { resource: r } of d.entries) {
      const buffer = r.buffer || (typeof GPUBuffer !== "undefined" && r instanceof GPUBuffer ? r : null);
      if (buffer && buffer.usage & 128) total += r.size ?? buffer.size - (r.offset || 0);
    }
    sizes.set(group, total);
  });
  wrap(GPUComputePassEncoder, "setBindGroup", (pass, [index, group]) => {
    const groups = bound.get(pass) || [];
    groups[index] = group ? sizes.get(group) || 0 : 0;
    bound.set(pass, groups);
  });
  for (const name of ["dispatchWorkgroups", "dispatchWorkgroupsIndirect"]) {
    wrap(GPUComputePassEncoder, name, (pass) => {
      c.dispatches++;
      c.bytes += (bound.get(pass) || []).reduce((a, b) => a + (b || 0), 0);
    });
  }
  wrap(GPUQueue, "submit", () => c.submits++);
})();
