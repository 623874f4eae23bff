// A language model: one sequence over the cache in the module's memory, sampling, streamed text. What index.js of such a package hands out.

import { asLuthierError, ClosedError, InputError, UnsupportedError } from "./errors.js";
import { Files } from "./files.js";
import { loadModel, placesOf } from "./model.js";
import { textOf } from "./platform.js";
import { Sampler } from "./sampling.js";

/** The class Tokenizer of the library: the page's own, an installed one, or the one in the package's node_modules. null without any. */
async function tokenizerClass() {
  const installed = () => import("@huggingface/tokenizers");
  const beside = () => {
    const file = new URL(/* @vite-ignore */ /* webpackIgnore: true */ "../node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs", import.meta.url);
    return import(/* @vite-ignore */ /* webpackIgnore: true */ file.href);
  };
  for (const find of [installed, beside]) {
    try {
      return (await find()).Tokenizer;
    } catch {
      // the next one
    }
  }
  return null;
}

/** `given`: undefined, a class like the library's, or an object with encode(text) and decode(tokens). */
async function makeTokenizer(given, about, places, options) {
  if (given && typeof given !== "function") return given;
  if (!about.tokenizer || given === null) return null;
  const Tokenizer = given || (await tokenizerClass());
  if (!Tokenizer) return null;
  const bytes = await new Files(places, options).checked("tokenizer.json", about.tokenizer);
  const library = new Tokenizer(JSON.parse(await textOf(bytes)), { clean_up_tokenization_spaces: false });
  return {
    encode: (text) => library.encode(text, { add_special_tokens: Boolean(about.special) }).ids,
    decode: (tokens) => library.decode(tokens, { skip_special_tokens: true, clean_up_tokenization_spaces: false }),
  };
}

/** The messages [{role, content}] in the ChatML format, ready for the assistant's answer. */
export const chatML = (messages) => `${messages.map((m) => `<|im_start|>${m.role}\n${m.content}<|im_end|>\n`).join("")}<|im_start|>assistant\n`;

/** One sequence: the cache holds its first `length` tokens, at most `capacity`. Calls follow one another; a second one at a time is refused. */
export class LanguageModel {
  #model;
  #tokenizer;
  #busy = false;

  constructor(model, about, tokenizer) {
    this.#model = model;
    this.#tokenizer = tokenizer;
    this.name = model.name;
    this.capacity = about.capacity;
    this.vocabulary = about.vocabulary;
    this.chunk = about.chunk;
    this.endTokens = Object.freeze([...about.end]);
    this.about = about;
    this.length = 0;
  }

  get info() {
    return this.#model.info;
  }

  /** Whether texts can be given and taken, not only tokens. */
  get hasTokenizer() {
    return this.#tokenizer !== null;
  }

  get tokenizer() {
    if (this.#tokenizer) return this.#tokenizer;
    throw new UnsupportedError("NO_TOKENIZER", "texts need a tokenizer, and none was found", "npm install @huggingface/tokenizers (in the package's folder for a page without a bundler), pass load(url, { tokenizer }), or use tokens");
  }

  /** Tokens of a text. */
  encode(text) {
    const ids = Array.from(this.tokenizer.encode(String(text)), Number);
    return this.about.begin === null ? ids : [this.about.begin, ...ids];
  }

  decode(tokens) {
    return this.tokenizer.decode(Array.from(tokens));
  }

  /** Forgets the sequence, or all but its first tokens. */
  reset(length = 0) {
    if (!Number.isInteger(length) || length < 0 || length > this.length) {
      throw new InputError("OUT_OF_RANGE", `the sequence has ${this.length} tokens, ${length} cannot be kept`);
    }
    this.length = length;
  }

  check(tokens) {
    if (!tokens.length) throw new InputError("NO_TOKENS", "no tokens to feed", "give at least one");
    const bad = tokens.find((t) => !Number.isInteger(t) || t < 0 || t >= this.vocabulary);
    if (bad !== undefined) throw new InputError("UNKNOWN_TOKEN", `token ${bad} is outside of the vocabulary of ${this.vocabulary}`, "use the model's own tokenizer", { token: bad });
    if (this.length + tokens.length > this.capacity) {
      throw new InputError("CACHE_FULL", `the cache holds ${this.capacity} positions; ${this.length} are used and ${tokens.length} more were given`, "reset() the model, or compile it with a larger capacity");
    }
  }

  /** Appends tokens to the sequence, in chunks; the logits after the last one (Float32Array of `vocabulary` numbers). */
  async feed(tokens, { signal } = {}) {
    const all = Array.from(tokens, Number);
    this.check(all);
    if (this.#busy) throw new InputError("BUSY", "the model is at work on another call", "await the first one");
    this.#busy = true;
    try {
      let logits;
      for (let at = 0; at < all.length; at += this.chunk) {
        if (signal && signal.aborted) throw new ClosedError("ABORTED", "the call was aborted");
        const part = all.slice(at, at + this.chunk);
        const inputs = { tokens: BigInt64Array.from(part, BigInt) };
        if (this.about.by === "past") inputs.past = new Uint8Array(this.length); // only its length counts
        else inputs.pos = new BigInt64Array([BigInt(this.length)]);
        if (!this.about.all_logits) inputs.last = new BigInt64Array([BigInt(part.length - 1)]);
        logits = (await this.#model.run(inputs)).logits.data;
        this.length += part.length;
      }
      return logits.length > this.vocabulary ? logits.slice(logits.length - this.vocabulary) : logits;
    } catch (error) {
      throw asLuthierError(error);
    } finally {
      this.#busy = false;
    }
  }

  /**
   * Tokens that continue the sequence after `prompt` (tokens), until an end token, `maxTokens` or a full cache. Options: maxTokens (128),
   * temperature (0: the most likely token), topK (40; 0: all), topP (0.95), seed, stop (more end tokens), signal.
   */
  async *generateTokens(prompt, { maxTokens = 128, stop = [], signal, ...sampling } = {}) {
    const sampler = new Sampler(sampling);
    const ends = new Set([...this.endTokens, ...stop]);
    let logits = await this.feed(prompt, { signal });
    for (let k = 0; k < maxTokens; k++) {
      const token = sampler.pick(logits);
      if (ends.has(token)) return;
      yield token;
      if (this.length >= this.capacity || k + 1 === maxTokens) return;
      logits = await this.feed([token], { signal });
    }
  }

  /**
   * Pieces of text as they are decided. `prompt`: a text to continue, or messages [{role, content}] for a model with the ChatML format.
   * Options as of generateTokens. The bytes of a character that is not complete yet are held back.
   */
  async *generate(prompt, options = {}) {
    let text = prompt;
    if (Array.isArray(prompt)) {
      if (this.about.chat !== "chatml") throw new UnsupportedError("NO_CHAT_FORMAT", "the model has no ChatML template", "give the whole prompt as a text");
      text = chatML(prompt);
    }
    let held = [];
    for await (const token of this.generateTokens(this.encode(text), options)) {
      held.push(token);
      const piece = this.decode(held);
      if (piece.endsWith("\ufffd") && held.length < 8) continue;
      held = [];
      if (piece) yield piece;
    }
    const rest = held.length ? this.decode(held) : "";
    if (rest) yield rest;
  }

  /** Frees memory and workers. */
  close() {
    return this.#model.close();
  }

  /** For tests: see Model. */
  debug(action) {
    return this.#model.debug(action);
  }
}

/** As loadModel; one more option, `tokenizer`: an object {encode(text), decode(tokens)}, a class like the library's, or null for none. */
export async function loadLanguageModel(where, id, { tokenizer, ...options } = {}) {
  const model = await loadModel(where, id, options);
  try {
    return new LanguageModel(model, model.language, await makeTokenizer(tokenizer, model.language, placesOf(where), options));
  } catch (error) {
    await model.close();
    throw asLuthierError(error);
  }
}
