// Firefox over WebDriver BiDi for Python: opens a page, calls functions that a module of its server exports, prints their results. See engines.py.

import { spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [executable, page, module, calls] = process.argv.slice(2); // calls: JSON of [[function, argument], ...]
const profile = mkdtempSync(join(tmpdir(), "firefox-"));
const firefox = spawn(executable, ["--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0"], {
  stdio: ["ignore", "ignore", "pipe"],
  env: { ...process.env, HOME: profile },
});
const ended = new Promise((done) => firefox.on("close", done));

const address = () =>
  new Promise((done, failed) => {
    let text = "";
    firefox.stderr.on("data", (data) => {
      text += data;
      const found = /WebDriver BiDi listening on (\S+)/.exec(text);
      if (found) done(found[1]);
    });
    ended.then(() => failed(new Error(`Firefox ended: ${text}`)));
  });

try {
  const socket = new WebSocket(`${await address()}/session`);
  await new Promise((done, failed) => {
    socket.onopen = done;
    socket.onerror = failed;
  });
  const waiting = new Map();
  socket.onmessage = ({ data }) => {
    const reply = JSON.parse(data);
    const call = waiting.get(reply.id);
    if (call) call[reply.type === "success" ? 0 : 1](reply.type === "success" ? reply.result : new Error(`${reply.error}: ${reply.message}`));
  };
  let next = 0;
  const ask = (method, params) =>
    new Promise((done, failed) => {
      waiting.set(++next, [done, failed]);
      socket.send(JSON.stringify({ id: next, method, params }));
    });
  await ask("session.new", { capabilities: {} });
  const { context } = await ask("browsingContext.create", { type: "tab" });
  await ask("browsingContext.navigate", { context, url: page, wait: "complete" });
  const functionDeclaration = "async (module, name, argument) => JSON.stringify(await (await import(module))[name](JSON.parse(argument)))";
  const results = [];
  for (const [name, argument] of JSON.parse(calls)) {
    const words = [module, name, JSON.stringify(argument)].map((value) => ({ type: "string", value }));
    const reply = await ask("script.callFunction", { functionDeclaration, awaitPromise: true, target: { context }, arguments: words });
    if (reply.type !== "success") throw new Error(reply.exceptionDetails.text);
    results.push(JSON.parse(reply.result.value));
  }
  console.log(JSON.stringify(results));
  await ask("browser.close", {});
} finally {
  firefox.kill();
  await ended;
  rmSync(profile, { recursive: true, force: true, maxRetries: 3 });
}
process.exit();
