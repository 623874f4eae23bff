// The page's side of benchmarks/web_llm.py: one runtime a page. setup() loads, turn() generates and tells the times.

const NPM = "/node_modules";
let run = null;

const PIECE = (event) => event.choices?.[0]?.text ?? "";

async function luthier({ url, options }) {
  const { Tokenizer } = await import(`${NPM}/@huggingface/tokenizers/dist/tokenizers.min.mjs`);
  const { load } = await import(`${url}index.js`);
  const model = await load(url, { tokenizer: Tokenizer, ...options });
  return {
    info: model.info,
    async *generate(prompt, maxTokens) {
      model.reset();
      const tokens = model.encode(prompt);
      const held = [];
      for await (const token of model.generateTokens(tokens, { maxTokens, temperature: 0 })) {
        held.push(token);
        yield { text: () => model.decode(held), prompt: tokens.length };
      }
    },
  };
}

async function wllama({ url, options }) {
  const { Wllama } = await import(`${NPM}/@wllama/wllama/esm/index.js`);
  const quiet = { debug() {}, log() {}, warn() {}, error() {} };
  const model = new Wllama({ default: `${NPM}/@wllama/wllama/esm/wasm/wllama.wasm` }, { suppressNativeLog: true, logger: quiet });
  const file = await (await fetch(url)).blob();
  await model.loadModel([file], { n_threads: options.threads, n_gpu_layers: 0, n_ctx: options.capacity, n_batch: options.chunk, n_parallel: 1 });
  return {
    info: { threads: model.getNumThreads(), multithread: model.isMultithread(), version: Wllama.getLibllamaVersion() },
    async *generate(prompt, maxTokens) {
      const events = await model.createCompletion({ prompt, max_tokens: maxTokens, temperature: 0, cache_prompt: false, stream: true, timings_per_token: true });
      let text = "";
      for await (const event of events) {
        const piece = PIECE(event);
        if (!piece) continue;
        text += piece;
        yield { text: () => text, prompt: event.timings?.prompt_n, timings: event.timings };
      }
    },
  };
}

export async function setup({ runtime, ...rest }) {
  const start = performance.now();
  run = await { luthier, wllama }[runtime](rest);
  return { info: run.info, load_ms: performance.now() - start };
}

/** {first_ms, token_ms, tokens, text, prompt}: time to the first token, mean time of each later one. */
export async function turn({ prompt, tokens }) {
  const start = performance.now();
  let first = 0;
  let last = 0;
  let count = 0;
  let event = null;
  for await (event of run.generate(prompt, tokens)) {
    last = performance.now();
    first ||= last;
    count += 1;
  }
  return { first_ms: first - start, token_ms: (last - first) / (count - 1), tokens: count, text: event.text(), prompt: event.prompt, timings: event.timings ?? null };
}
