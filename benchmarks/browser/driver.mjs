// Chromium for Python: one JSON request a line on standard input, one JSON answer a line on standard output. See browser.py.

import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [modules, executable, ...flags] = process.argv.slice(2);
const { chromium } = createRequire(`${modules}/x.js`)("playwright-core");
const browser = await chromium.launch({ executablePath: executable, headless: true, args: flags });
const pages = new Map();
let next = 1;

const operations = {
  version: () => browser.version(),
  async open({ url, scripts }) {
    const context = await browser.newContext();
    const page = await context.newPage();
    const log = [];
    page.on("console", (m) => log.push(`${m.type()}: ${m.text()}`));
    page.on("pageerror", (e) => log.push(`pageerror: ${e.message}`));
    for (const script of scripts || []) await page.addInitScript(script);
    const key = next++;
    pages.set(key, { page, context, log });
    await page.goto(url, { waitUntil: "commit" });
    return key;
  },
  // what the global promise `answer` of an extension's background worker comes to, in a browser of its own
  async extension({ folder }) {
    const args = [...flags, `--disable-extensions-except=${folder}`, `--load-extension=${folder}`];
    const context = await chromium.launchPersistentContext("", { executablePath: executable, headless: true, args });
    try {
      const worker = context.serviceWorkers()[0] || (await context.waitForEvent("serviceworker", { timeout: 30000 }));
      return await worker.evaluate(() => globalThis.answer);
    } finally {
      await context.close();
    }
  },
  async goto({ key, url }) {
    await pages.get(key).page.goto(url, { waitUntil: "commit" });
  },
  // a function exported by a module that the page's own server sends: no evaluation of text, so that strict policies hold
  call: ({ key, module, name, argument }) =>
    pages.get(key).page.evaluate(async ({ module, name, argument }) => (await import(module))[name](argument), { module, name, argument }),
  waitFor: ({ key, selector, timeout }) => pages.get(key).page.waitForSelector(selector, { timeout, state: "attached" }).then(() => true),
  text: ({ key, selector }) => pages.get(key).page.textContent(selector),
  screenshot: ({ key, path }) => pages.get(key).page.screenshot({ path, fullPage: true }).then(() => path),
  log: ({ key }) => pages.get(key).log,
  async close({ key }) {
    await pages.get(key).context.close();
    pages.delete(key);
  },
};

const answer = (data) => process.stdout.write(`${JSON.stringify(data)}\n`);
answer({ value: browser.version() });
for await (const line of createInterface({ input: process.stdin })) {
  const { op, ...request } = JSON.parse(line);
  try {
    answer({ value: (await operations[op](request)) ?? null });
  } catch (error) {
    answer({ error: String(error.stack || error) });
  }
}
await browser.close();
