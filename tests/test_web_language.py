"""Packages of language models: their JavaScript under Node against the same model in numpy."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.browser import NODE_MODULES
from luthier import llm
from luthier.importers.gguf.file import read_gguf
from luthier.importers.gguf_tokenizer import tokenizer_json
from luthier.llm.chat_template import render_chat
from tests.test_chat import CHATML, speaker
from tests.test_gguf import forward, tiny, write

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")
PROMPT = [5, 17, 93, 0, 41, 41, 8, 60, 2, 77, 12]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package next to the file that it was made of."""
    folder = tmp_path_factory.mktemp("language")
    llm.compile_model(tiny(folder / "tiny.gguf"), "wasm", capacity=32, chunk=4, exact=True).save(folder / "package", 0.1)
    return folder


def javascript(folder: Path, text: str, *argv: str) -> Any:
    """What the module ``text`` prints last, as JSON; ``load`` is the package's."""
    file = folder / "run.mjs"
    file.write_text('import { load } from "./package/index.js";\n' + text)
    done = subprocess.run([str(NODE), str(file), *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_logits_and_greedy_tokens(small: Path) -> None:
    text = """
    const prompt = JSON.parse(process.argv[2]);
    const out = {};
    for (const variant of ["simd", "simd-threads"]) {
      const m = await load(undefined, { variant, threads: 2, worker: variant === "simd" });
      const rows = [await m.feed(prompt.slice(0, 3)), await m.feed(prompt.slice(3, 4)), await m.feed(prompt.slice(4))];
      const tokens = [];
      m.reset(3);
      for await (const t of m.generateTokens(prompt.slice(3), { maxTokens: 5 })) tokens.push(t);
      out[variant] = { rows: rows.map((r) => Array.from(r)), tokens, length: m.length };
      await m.close();
    }
    console.log(JSON.stringify(out));
    """
    out = javascript(small, text, json.dumps(PROMPT))
    want = forward(small / "tiny.gguf", PROMPT)
    greedy = list(PROMPT)
    for _ in range(5):
        greedy.append(int(np.argmax(forward(small / "tiny.gguf", greedy)[-1])))
    for variant, got in out.items():
        for row, at in zip(got["rows"], (2, 3, 10), strict=True):
            assert np.abs(np.array(row) - want[at]).max() < 2e-3 * np.abs(want).max(), variant
        assert got["tokens"] == greedy[len(PROMPT) :], variant
        assert got["length"] == len(PROMPT) + 4


def test_bad_calls(small: Path) -> None:
    text = """
    const m = await load(undefined, { threads: 1 });
    const codes = [];
    const fails = async (f) => {
      try { await f(); codes.push("nothing"); } catch (e) { codes.push(`${e.name} ${e.code}`); }
    };
    const all = async (x) => { for await (const y of x) void y; };
    await fails(() => m.feed([]));
    await fails(() => m.feed([96]));
    await fails(() => m.feed([1.5]));
    await fails(() => m.feed(Array(33).fill(1)));
    await fails(() => m.reset(1));
    await fails(() => all(m.generate("text")));
    await fails(() => all(m.generate([{ role: "user", content: "text" }])));
    await fails(() => all(m.generateTokens([1], { temperature: -1 })));
    await fails(() => all(m.generateTokens([1], { topP: 0 })));
    await fails(() => all(m.generateTokens([1], { top_p: 0.5 })));
    await fails(async () => { for (const r of await Promise.allSettled([m.feed([1]), m.feed([1])])) if (r.reason) throw r.reason; });
    await fails(() => all(m.generateTokens([1], { signal: AbortSignal.abort() })));
    m.reset();
    let n = 0;
    for await (const t of m.generateTokens(Array(30).fill(1), { maxTokens: 50 })) n += 1;
    m.reset();
    await m.close();
    await fails(() => m.feed([1]));
    console.log(JSON.stringify([codes, n]));
    """
    codes, n = javascript(small, text)
    assert codes == [
        "InputError NO_TOKENS", "InputError UNKNOWN_TOKEN", "InputError UNKNOWN_TOKEN", "InputError CACHE_FULL", "InputError OUT_OF_RANGE",
        "UnsupportedError NO_TOKENIZER", "UnsupportedError NO_CHAT_FORMAT", "InputError OUT_OF_RANGE", "InputError OUT_OF_RANGE",
        "InputError UNKNOWN_OPTION", "InputError BUSY", "ClosedError ABORTED", "ClosedError CLOSED",
    ]  # fmt: skip
    assert n == 3


def test_text_by_a_given_tokenizer(small: Path) -> None:
    text = """
    const given = {
      encode: (text) => Array.from(text, (c) => c.charCodeAt(0) - 32),
      decode: (tokens) => new TextDecoder().decode(Uint8Array.from(tokens, (t) => (t % 3 === 0 ? 0xe2 : 0x41 + (t % 26)))),
    };
    const m = await load(undefined, { threads: 1, tokenizer: given });
    const tokens = [], pieces = [];
    for await (const t of m.generateTokens(m.encode("Hello"), { maxTokens: 6, temperature: 1, seed: 5 })) tokens.push(t);
    m.reset();
    for await (const p of m.generate("Hello", { maxTokens: 6, temperature: 1, seed: 5 })) pieces.push(p);
    console.log(JSON.stringify([pieces.join(""), given.decode(tokens)]));
    """
    streamed, whole = javascript(small, text)
    assert streamed.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_sampler(small: Path) -> None:
    text = """
    import { Sampler } from "./package/runtime/sampling.js";
    const logits = Float32Array.from([0.05, 0.5, 0.15, 0.3], Math.log);
    const count = (options, n = 4000) => {
      const s = new Sampler({ seed: 1, ...options });
      const out = [0, 0, 0, 0];
      for (let k = 0; k < n; k++) out[s.pick(logits)] += 1 / n;
      return out;
    };
    const all = { temperature: 1, topK: 0, topP: 1 };
    console.log(JSON.stringify([count({}), count({ ...all, topK: 2 }), count({ ...all, topP: 0.6 }), count(all), count({ ...all, topK: 3 })]));
    """
    greedy, two, nucleus, whole, three = map(np.array, javascript(small, text))
    assert greedy[1] > 0.999
    assert np.allclose(two, [0, 0.625, 0, 0.375], atol=0.03)
    assert np.allclose(nucleus, [0, 0.625, 0, 0.375], atol=0.03)
    assert np.allclose(whole, [0.05, 0.5, 0.15, 0.3], atol=0.03)
    assert np.allclose(three, np.array([0, 0.5, 0.15, 0.3]) / 0.95, atol=0.03)


def test_logits_that_are_no_numbers(small: Path) -> None:
    text = """
    import { Sampler } from "./package/runtime/sampling.js";
    const out = [];
    for (const bad of [NaN, Infinity, -Infinity]) for (const temperature of [0, 1]) for (const at of [0, 2, 4]) {
      const logits = new Float32Array(5).fill(bad === -Infinity ? bad : 1);
      logits[at] = bad;
      try { out.push(new Sampler({ temperature, topP: 1, topK: 0 }).pick(logits, "step 3")); } catch (e) { out.push(`${e.code} ${e.message.slice(0, 28)}`); }
    }
    console.log(JSON.stringify(out));
    """
    out = javascript(small, text)
    assert len(out) == 18 and all(x.startswith("BAD_LOGITS step 3: the logit of token") for x in out), out


def test_texts_that_go_on(tmp_path: Path) -> None:
    """As in Python: the beginning stands once, the last token is not forgotten, a chat is the whole sequence, and both give the same tokens."""
    pytest.importorskip("tokenizers")
    path = speaker(tmp_path / "m.gguf", add_bos_token=True)
    llm.compile_model(path, "wasm", capacity=128, exact=True).save(tmp_path / "package", 0.1)
    m = llm.load(path, threads=1, capacity=128, exact=True)
    talk = [{"role": "user", "content": "ab"}]
    turns, tokens = [], []
    for words in ("ab", "c"):
        turns.append("".join(m.generate(words, 4, chat=True)))
        tokens.append(list(m.tokens))
        talk = [*talk, {"role": "assistant", "content": turns[0]}, {"role": "user", "content": "c"}]
    prompts = [m.chat_prompt(talk[:1]), m.chat_prompt(talk[:3])]
    m.reset()
    plain = []
    for words, n in (("<s>ab", 2), ("c", 1), ("d", 3)):
        plain.append(["".join(m.generate(words, n)), list(m.tokens), list(m.waiting)])
    letters = {m.tokenizer.id_to_token(i): i for i in range(96)}
    text = """
    const [letters, talk, prompts, template] = JSON.parse(process.argv[2]);
    const names = Object.fromEntries(Object.entries(letters).map(([s, i]) => [i, s]));
    const tokenizer = {
      encode: (text) => (text.match(/<s>|<\\/s>|<\\|im_start\\|>|<\\|im_end\\|>|[^]/g) || []).map((s) => letters[s === " " ? "\u0120" : s === "\\n" ? "\u010a" : s]),
      decode: (tokens) => tokens.filter((t) => t > 3).map((t) => names[t].replace("\u0120", " ").replace("\u010a", "\\n")).join(""),
    };
    let rendered = 0;
    class Template {
      constructor(text) { if (text !== template) throw new Error("another template"); }
      render({ messages, add_generation_prompt, bos_token }) {
        if (!add_generation_prompt || bos_token !== "<s>") throw new Error("what is missing");
        return prompts[rendered++ % 2 && messages.length === 3 ? 1 : 0];
      }
    }
    const m = await load(undefined, { threads: 1, tokenizer, Template });
    const all = async (x) => { let text = ""; for await (const y of x) text += y; return text; };
    const out = { turns: [], tokens: [], plain: [] };
    for (const n of [1, 3]) {
      out.turns.push(await all(m.generate(talk.slice(0, n), { maxTokens: 4 })));
      out.tokens.push([...m.tokens]);
    }
    m.reset();
    for (const [words, maxTokens] of [["<s>ab", 2], ["c", 1], ["d", 3]]) out.plain.push([await all(m.generate(words, { maxTokens })), [...m.tokens], [...m.waiting]]);
    console.log(JSON.stringify(out));
    """
    out = javascript(tmp_path, text, json.dumps([letters, talk, prompts, CHATML]))
    assert out == {"turns": turns, "tokens": tokens, "plain": plain}


@pytest.mark.parametrize("kind", ["qwen2", "llama-bpe", "smollm", "pieces", "pieces without a blank"])
def test_the_libraries_of_a_package(tmp_path: Path, kind: str) -> None:
    """The tokenizer and the template library that npm installs read the package as Python's do: odd texts, both ways, and a chat."""
    tokenizers = pytest.importorskip("tokenizers")
    from tests.test_gguf_tokenizer import as_metadata, as_piece_metadata, odd_texts, pieces, reference

    library = NODE_MODULES / "@huggingface"
    if not all((library / n).is_dir() for n in ("jinja", "tokenizers")):
        pytest.skip("@huggingface/tokenizers and @huggingface/jinja are not installed (python benchmarks/setup_web.py --tests)")
    prefix = kind == "pieces"
    meta = as_piece_metadata(pieces(add_dummy_prefix=prefix)) if kind.startswith("pieces") else as_metadata(reference(kind, kind == "llama-bpe"), kind)
    source = write(tmp_path / "t.gguf", meta | ({"tokenizer.ggml.add_space_prefix": False} if kind.endswith("blank") else {}), {})
    data = tokenizer_json(read_gguf(source))
    module = llm.compile_model(tiny(tmp_path / "m.gguf"), "wasm", capacity=32, exact=True)
    module.manifest["language"]["chat"] = {"template": CHATML + "{{ messages | tojson }}{{ bos_token }}", "bos_token": "<s>"}
    module.files["tokenizer.json"] = lambda: data
    made = module.save(tmp_path / "package", 0.1)
    (made / "node_modules").mkdir()
    (made / "node_modules" / "@huggingface").symlink_to(library)
    text = """
    import { readFileSync } from "node:fs";
    const { texts, talk } = JSON.parse(readFileSync(process.argv[2]));
    const m = await load(undefined, { threads: 1 });
    const ids = texts.map((t) => m.encode(t));
    let fed;
    m.generateTokens = async function* (tokens) { fed = tokens; };
    for await (const piece of m.generate(talk)) void piece;
    console.log(JSON.stringify([ids, ids.map((t) => (t.length ? m.decode(t) : "")), fed]));
    """
    texts = [t for t in odd_texts() if "\0" not in t]
    talk = [{"role": "user", "content": "Hi <there>"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "é"}]
    (tmp_path / "in.json").write_text(json.dumps({"texts": texts, "talk": talk}))
    file = tmp_path / "run.mjs"
    file.write_text('import { load } from "./package/index.js";\n' + text)
    done = subprocess.run([str(NODE), str(file), str(tmp_path / "in.json")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    t = tokenizers.Tokenizer.from_str(data.decode())
    want = [t.encode(x, add_special_tokens=False).ids for x in texts]
    chat = t.encode(render_chat(CHATML + "{{ messages | tojson }}{{ bos_token }}", talk, {"bos_token": "<s>"}), add_special_tokens=False).ids
    assert json.loads(done.stdout.strip().split("\n")[-1]) == [want, [t.decode(x) for x in want], chat]


def test_streamed_bytes(small: Path) -> None:
    """Characters of several tokens appear whole, one that is never completed does not appear."""
    text = """
    const bytes = [...new TextEncoder().encode("a\\u{1f600}b\\u00e9\\u65e5"), 0xf0, 0x9f, 0x98];
    const given = { encode: () => [1], decode: (tokens) => new TextDecoder().decode(Uint8Array.from(tokens)) };
    const m = await load(undefined, { threads: 1, tokenizer: given });
    let at = 0;
    m.generateTokens = async function* () { for (const t of bytes) yield t; };
    const pieces = [];
    for await (const p of m.generate("x")) pieces.push(p);
    console.log(JSON.stringify(pieces));
    """
    assert javascript(small, text) == ["a", "😀", "b", "é", "日"]


def test_types_of_the_package(small: Path) -> None:
    types = (small / "package" / "index.d.ts").read_text()
    assert "export class LanguageModel" in types and "cache.0" not in types and "Promise<LanguageModel>" in types
    package = json.loads((small / "package" / "package.json").read_text())
    assert list(package["dependencies"]) == ["@huggingface/jinja", "@huggingface/tokenizers"]
