// The worker in which a page's inference lives: messages in, messages out.

import { describe, openEngine } from "./engine.js";
import { pack } from "./errors.js";
import { parentPort } from "./platform.js";

let port;
let engine = null;

const operations = {
  async load({ places, mark, options }) {
    let last = 0;
    const opened = await openEngine(places, mark, options, (progress) => {
      const now = performance.now();
      if (now - last < 30 && progress.loaded < progress.total) return;
      last = now;
      port.post({ progress });
    });
    engine = opened.engine;
    return { ...describe(opened.manifest), info: engine.info };
  },
  async run({ inputs, outputs }) {
    return engine.run(inputs, outputs);
  },
  async info() {
    return engine.info;
  },
  async close() {
    if (engine) await engine.close();
    engine = null;
  },
  async debug({ action }) {
    return engine.debug(action);
  },
};

let queue = Promise.resolve();

async function answer(message) {
  try {
    const value = await operations[message.op](message);
    const transfer = message.op === "run" ? Object.values(value).map((t) => t.data.buffer) : [];
    port.post({ id: message.id, value, info: engine ? engine.info : null }, transfer);
  } catch (error) {
    port.post({ id: message.id, error: pack(error) });
  }
}

// no await at the top: a bundler may make a classic script of this file
parentPort().then((opened) => {
  port = opened;
  port.onMessage((message) => {
    queue = queue.then(() => answer(message));
  });
  port.post({ up: true });
});
