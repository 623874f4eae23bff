// A language model: one sequence over the cache in the module's memory, sampling, streamed text. What index.js of such a package hands out.

import { asLuthierError, ClosedError, InputError, UnsupportedError } from "./errors.js";
import { Files } from "./files.js";
import { loadModel, placesOf } from "./model.js";
import { textOf } from "./platform.js";
import { Sampler } from "./sampling.js";

const LIBRARY = "@huggingface/tokenizers";
const TEMPLATES = "@huggingface/jinja";
const MARK = "\ufffd"; // what stands for bytes that are no character

/** What the package's own node_modules holds of a library; null where it does not. */
function beside(library, file) {
  const url = new URL(/* @vite-ignore */ /* webpackIgnore: true */ `../node_modules/${library}/dist/${file}`, import.meta.url);
  return import(/* @vite-ignore */ /* webpackIgnore: true */ url.href).catch(() => ({}));
}

/** The class Tokenizer of the library: the page's own, an installed one, or the one in the package's node_modules. undefined without any. */
async function tokenizerClass() {
  try {
    return (await import("@huggingface/tokenizers")).Tokenizer; // inside `try`, so that bundlers do without
  } catch {
    return (await beside(LIBRARY, "tokenizers.min.mjs")).Tokenizer;
  }
}

/** The class Template of the library, found in the same way. */
async function templateClass() {
  try {
    return (await import("@huggingface/jinja")).Template;
  } catch {
    return (await beside(TEMPLATES, "index.js")).Template;
  }
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
    encode: (text, first) => library.encode(text, { add_special_tokens: first && Boolean(about.special) }).ids,
    decode: (tokens) => library.decode(tokens, { skip_special_tokens: true, clean_up_tokenization_spaces: false }),
  };
}

/** The messages [{role, content}] as the model's own template writes them, ready for the answer. */
async function renderChat(about, messages, given) {
  if (!about.chat || !about.chat.template) throw new UnsupportedError("NO_CHAT_FORMAT", "the model has no chat template", "give the whole prompt as a text");
  const Template = given || (await templateClass());
  if (!Template) throw new UnsupportedError("NO_TEMPLATES", "chats need a library that renders templates, and none was found", `npm install ${TEMPLATES}, pass load(url, { Template }), or give the whole prompt as a text`);
  const { template, ...names } = about.chat;
  try {
    return new Template(template).render({ messages, tools: null, documents: null, add_generation_prompt: true, ...names });
  } catch (error) {
    throw new InputError("CHAT_TEMPLATE", `the model's chat template refuses these messages: ${error.message}`);
  }
}

function commonLength(a, b) {
  let n = 0;
  while (n < a.length && n < b.length && a[n] === b[n]) n++;
  return n;
}

/**
 * One sequence: the cache holds `tokens`, `length` of at most `capacity`. `waiting`: the last token that generateTokens decided, where it was not fed yet
 * (the mark that ended the text, or the last of maxTokens); the next call begins with it. Calls follow one another; a second one at a time is refused.
 */
export class LanguageModel {
  #model;
  #tokenizer;
  #Template;
  #busy = false;

  constructor(model, about, tokenizer, Template) {
    this.#model = model;
    this.#tokenizer = tokenizer;
    this.#Template = Template;
    this.name = model.name;
    this.capacity = about.capacity;
    this.vocabulary = about.vocabulary;
    this.chunk = about.chunk;
    this.endTokens = Object.freeze([...about.end]);
    this.about = about;
    this.tokens = [];
    this.waiting = [];
  }

  get length() {
    return this.tokens.length;
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
    throw new UnsupportedError("NO_TOKENIZER", "texts need a tokenizer, and none was found", `npm install ${LIBRARY} (in the package's folder for a page without a bundler), pass load(url, { tokenizer }), or use tokens`);
  }

  /** Tokens of a text, with the mark that begins one where the sequence is empty. */
  encode(text) {
    const first = !this.length && !this.waiting.length;
    const ids = Array.from(this.tokenizer.encode(String(text), first), Number);
    return first ? this.#begun(ids) : ids;
  }

  #begun(ids) {
    const { begin } = this.about;
    return begin === null || ids[0] === begin ? ids : [begin, ...ids];
  }

  decode(tokens) {
    return this.tokenizer.decode(Array.from(tokens));
  }

  /** Forgets the sequence, or all but its first tokens. */
  reset(length = 0) {
    if (!Number.isInteger(length) || length < 0 || length > this.length) {
      throw new InputError("OUT_OF_RANGE", `the sequence has ${this.length} tokens, ${length} cannot be kept`);
    }
    this.tokens.length = length;
    this.waiting = [];
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
        this.tokens.push(...part);
      }
      this.waiting = [];
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
    let logits = await this.feed([...this.waiting, ...prompt], { signal });
    for (let k = 0; k < maxTokens; k++) {
      const token = sampler.pick(logits, `step ${k} of this call, after ${this.length} tokens of the sequence`);
      this.waiting = [token];
      if (ends.has(token)) return;
      yield token;
      if (this.length >= this.capacity || k + 1 === maxTokens) return;
      logits = await this.feed([token], { signal });
    }
  }

  /**
   * Pieces of text as they are decided. `prompt`: a text that continues the sequence, or the messages [{role, content}] of a whole conversation, which the
   * model's own template writes: the sequence becomes it, and what the cache holds of it already is kept. Options as of generateTokens.
   */
  async *generate(prompt, options = {}) {
    let ids;
    let from = 0;
    if (Array.isArray(prompt)) {
      const text = await renderChat(this.about, prompt, this.#Template);
      ids = this.#begun(Array.from(this.tokenizer.encode(text, false), Number));
      from = Math.max(0, Math.min(commonLength(this.tokens, ids), ids.length - 1)); // one at least has to be fed
      this.reset(from);
    } else ids = this.encode(prompt);
    yield* this.#stream(this.generateTokens(ids.slice(from), options), ids.slice(-8));
  }

  /** Text as tokens arrive after those `shown`; the bytes of a character that is not complete yet are held back, and left out where it never is. */
  async *#stream(tokens, shown) {
    let held = [];
    const more = () => {
      const whole = this.decode([...shown, ...held]);
      return whole.slice(commonLength(this.decode(shown), whole));
    };
    for await (const token of tokens) {
      held.push(token);
      const piece = more();
      if (piece.endsWith(MARK) && held.length < 8) continue; // so many are no character
      if (piece) yield piece;
      shown = this.decode(shown).endsWith(MARK) ? [...shown, ...held] : held; // begins with a whole character
      held = [];
    }
    let rest = more();
    while (rest.endsWith(MARK)) rest = rest.slice(0, -1);
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

/**
 * As loadModel; two more options: `tokenizer`: an object {encode(text), decode(tokens)}, a class like the library's, or null for none; `Template`: a class
 * like the one of @huggingface/jinja.
 */
export async function loadLanguageModel(where, id, { tokenizer, Template, ...options } = {}) {
  const model = await loadModel(where, id, options);
  try {
    return new LanguageModel(model, model.language, await makeTokenizer(tokenizer, model.language, placesOf(where), options), Template);
  } catch (error) {
    await model.close();
    throw asLuthierError(error);
  }
}
