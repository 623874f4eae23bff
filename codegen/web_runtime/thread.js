// A helper thread of the WebAssembly engine: sleeps inside the module between runs.

import { parentPort } from "./platform.js";

// no await at the top: a bundler may make a classic script of this file
parentPort().then((port) => {
  port.onMessage(async ({ module, memory, number, faults }) => {
    const { exports } = await WebAssembly.instantiate(module, { env: { memory } });
    port.post({ ready: true });
    try {
      exports.lt_worker(number);
    } catch (error) {
      // the thread that waits for this one cannot listen: who owns it is told, and ends it
      if (faults) new BroadcastChannel(faults).postMessage(String(error));
      throw error;
    }
  });
  port.post({ up: true });
});
