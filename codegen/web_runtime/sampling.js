// Picks a token by logits.

import { InputError, KernelError } from "./errors.js";

/** Numbers in [0, 1) from a 32-bit state (a counter, scrambled). */
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x9e3779b9) >>> 0;
    let x = state;
    x = Math.imul(x ^ (x >>> 16), 0x21f0aaad);
    x = Math.imul(x ^ (x >>> 15), 0x735a2d97);
    return ((x ^ (x >>> 15)) >>> 0) / 2 ** 32;
  };
}

/** The place of the largest logit. Throws where one is no number, or none is finite. */
function argmax(logits, where) {
  let best = 0;
  let top = -Infinity;
  for (let k = 0; k < logits.length && !Number.isNaN(top); k++) {
    if (logits[k] <= top) continue; // NaN is not
    best = k;
    top = logits[k];
  }
  if (Number.isFinite(top)) return best;
  throw new KernelError("BAD_LOGITS", `${where}: the logit of token ${best} is ${logits[best]}`, "the model's weights are damaged, or its numbers leave their range");
}

/** Indices of the `count` largest logits, largest first. */
function largest(logits, count) {
  if (count >= logits.length) return Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]);
  const kept = []; // ascending
  for (let k = 0; k < logits.length; k++) {
    const v = logits[k];
    if (kept.length === count && v <= logits[kept[0]]) continue;
    let at = kept.length === count ? 1 : 0;
    const end = kept.length;
    while (at < end && logits[kept[at]] < v) at++;
    if (kept.length === count) {
      kept.splice(at, 0, k);
      kept.shift();
    } else kept.splice(at, 0, k);
  }
  return kept.reverse();
}

/** `temperature` 0: the most likely token. `topK`: only the k most likely (0: all); `topP`: only the most likely with this probability together. */
export class Sampler {
  constructor({ temperature = 0, topK = 40, topP = 0.95, seed = Math.floor(Math.random() * 2 ** 32), ...unknown } = {}) {
    const names = Object.keys(unknown);
    if (names.length) throw new InputError("UNKNOWN_OPTION", `there is no option "${names[0]}"`, "known: maxTokens, temperature, topK, topP, seed, stop, signal");
    if (!(temperature >= 0)) throw new InputError("OUT_OF_RANGE", `temperature ${temperature} must be at least 0`);
    if (!Number.isInteger(topK) || topK < 0) throw new InputError("OUT_OF_RANGE", `topK ${topK} must be an integer of at least 0`);
    if (!(topP > 0 && topP <= 1)) throw new InputError("OUT_OF_RANGE", `topP ${topP} must be above 0 and at most 1`);
    Object.assign(this, { temperature, topK, topP, random: generator(seed) });
  }

  /** A token; `where` stands before the message of an error. */
  pick(logits, where = "sampling") {
    const best = argmax(logits, where);
    if (this.temperature === 0) return best;
    const order = largest(logits, this.topK || logits.length);
    const top = logits[order[0]];
    const p = order.map((k) => Math.exp((logits[k] - top) / this.temperature));
    const limit = this.topP * p.reduce((a, b) => a + b, 0);
    let kept = 0;
    let sum = 0;
    while (kept < p.length && sum < limit) sum += p[kept++];
    let x = this.random() * sum;
    for (let k = 0; k < kept; k++) {
      x -= p[k];
      if (x < 0) return order[k];
    }
    return order[kept - 1];
  }
}
