"""Chats: the model's own template rendered as the libraries do it, and sequences that go on over several calls."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from luthier import llm
from luthier.cli.commands import luthier as luthier_command
from luthier.errors import InputError, InvalidModel
from luthier.importers.gguf.file import read_gguf
from luthier.llm.chat_template import render_chat
from tests.test_gguf import tiny, write

USER = [{"role": "user", "content": "Hi <there>"}]
CHATML = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(("template", "want"), [
    (CHATML, "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi <there><|im_end|>\n<|im_start|>assistant\n"),
    ("{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}\nend", "user\nend"),  # blocks take their line's blanks and its end
    ("{{ bos_token }}{{ messages[0].content | trim | upper }}{{ eos_token }}", "<s>HI <THERE></s>"),
    ("{{ messages | tojson }}", json.dumps(USER)),  # no marks of HTML
    ("{{ {'b': 'é', 'a': [1, none, true]} | tojson(indent=2) }}", '{\n  "b": "é",\n  "a": [\n    1,\n    null,\n    true\n  ]\n}'),
    ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!", "Hi <there>!"),
    ("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }} {{ nothing is defined }}", "True True True False"),
    ("{%- macro f(x) -%} [{{ x }}] {%- endmacro -%} {{ f(messages[-1]['role']) }}", "[user]"),
])  # fmt: skip
def test_templates(template: str, want: str) -> None:
    assert render_chat(template, USER, {"bos_token": "<s>", "eos_token": "</s>"}) == want


def test_the_date_of_a_template() -> None:
    before = datetime.datetime.now().strftime("%d %B %Y")
    got = render_chat("{{ strftime_now('%d %B %Y') }}", USER)
    assert got in (before, datetime.datetime.now().strftime("%d %B %Y"))


@pytest.mark.parametrize(("template", "messages", "error", "text"), [
    ("{{ raise_exception('roles must alternate') }}", USER, InputError, "roles must alternate"), ("{% if %}", USER, InvalidModel, "TemplateSyntaxError"),
    ("{{ ''.__class__.__mro__ }}", USER, InvalidModel, "SecurityError"), ("{{ messages.append(1) }}", USER, InvalidModel, "SecurityError"),
    ("{{ 1 / 0 }}", USER, InvalidModel, "ZeroDivisionError"), ("{{ messages[0].absent.more }}", USER, InvalidModel, "UndefinedError"),
    ("{{ 1 }}", ["Hi"], InputError, "has a role and a content, not 'Hi'"), ("{{ 1 }}", [{"content": "x"}], InputError, "has a role"),
])  # fmt: skip
def test_bad_templates(template: str, messages: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        render_chat(template, messages)


# ---------------------------------------------------------------- sequences

TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def speaker(path: Path, template: str | None = CHATML, **more: Any) -> Path:
    """The small Llama with a byte tokenizer over its 96 tokens: marks, blank, line end, letters."""
    letters = [chr(c) for c in range(33, 127) if chr(c) not in '"#$%&'][: 96 - len(TOKENS) - 2]
    meta = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": [*TOKENS, "Ġ", "Ċ", *letters], "tokenizer.ggml.merges": ["z z"], "tokenizer.ggml.token_type": np.array([3] * 4 + [1] * 92, np.int32),
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, **{f"tokenizer.ggml.{k}": v for k, v in more.items()},
    }  # fmt: skip
    if template is not None:
        meta["tokenizer.chat_template"] = template
    g = read_gguf(tiny(path.with_suffix(".plain")))
    return write(path, g.metadata | meta | {"llama.context_length": 256}, {n: ({"F32": 0, "Q4_1": 3, "Q8_0": 8}[t.kind], t.shape, t.raw.tobytes()) for n, t in g.tensors.items()})


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> llm.LanguageModel:
    pytest.importorskip("tokenizers")
    return llm.load(speaker(tmp_path_factory.mktemp("chat") / "m.gguf", add_bos_token=True), threads=1, exact=True)


@pytest.fixture
def model(spoken: llm.LanguageModel) -> llm.LanguageModel:
    spoken.reset()
    return spoken


def forced(m: llm.LanguageModel, monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
    """Make the sampler decide these tokens, one after the other."""
    left = iter(tokens)
    monkeypatch.setattr(llm.Sampling, "pick", lambda self, logits, rng: next(left))


def test_texts_that_go_on(model: llm.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning stands once, and what was decided last is in the sequence, whether it ended the text or the count did."""
    a, b, c = (model.tokenizer.token_to_id(x) for x in "abc")
    forced(model, monkeypatch, [b, c, 1, b])
    assert "".join(model.generate("a", 2)) == "bc" and model.tokens == [0, a, b] and model.waiting == [c]
    assert "".join(model.generate("a", 5)) == "" and model.tokens == [0, a, b, c, a] and model.waiting == [1]
    assert "".join(model.generate("c", 1)) == "b" and model.tokens == [0, a, b, c, a, 1, c]
    model.reset()
    forced(model, monkeypatch, [b])
    list(model.generate("<s>a", 1))
    assert model.tokens == [0, a]  # not twice


def test_tokens_that_go_on(model: llm.LanguageModel) -> None:
    """Two calls and one give the same sequence."""
    whole = list(model.decode_tokens([7, 8, 9], 6))
    model.reset()
    first = list(model.decode_tokens([7, 8, 9], 3))
    assert first + list(model.decode_tokens([], 3)) == whole
    model.reset()
    steps = model.decode_tokens([7, 8, 9], 6)
    assert [next(steps) for _ in range(2)] == whole[:2]
    steps.close()  # type: ignore[attr-defined]
    assert list(model.decode_tokens([], 4)) == whole[2:]


def test_a_chat_of_several_turns(model: llm.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequence is the rendered conversation at every turn, and nothing is computed twice that stays."""
    b, c = (model.tokenizer.token_to_id(x) for x in "bc")
    fed: list[int] = []
    feed = type(model).feed
    monkeypatch.setattr(model, "feed", lambda tokens: (fed.extend(tokens), feed(model, tokens))[1])

    def rendered(messages: list[dict[str, str]]) -> list[int]:
        return [0, *model.tokenizer.encode(render_chat(CHATML, messages), add_special_tokens=False).ids]

    forced(model, monkeypatch, [b, c, 3, c, 3])
    talk = [{"role": "user", "content": "a"}]
    assert "".join(model.generate("a", 5, chat=True)) == "bc" and model.tokens == [*rendered(talk), b, c]
    talk += [{"role": "assistant", "content": "bc"}, {"role": "user", "content": "aa"}]
    first = len(fed)
    assert "".join(model.generate("aa", 5, chat=True)) == "c" and model.tokens == [*rendered(talk), c]
    assert [*rendered(talk[:1]), b, c] + fed[first:] == [*rendered(talk), c]  # only what is new
    assert model.messages == [*talk, {"role": "assistant", "content": "c"}]
    # a whole conversation with another beginning takes the place of this one
    forced(model, monkeypatch, [3])
    other = [{"role": "system", "content": "x"}, {"role": "user", "content": "a"}]
    list(model.generate(other, 5))
    assert model.tokens == rendered(other)
    list(model.generate(other, 0))
    assert model.tokens == rendered(other)


def test_streams_of_bytes(tmp_path: Path) -> None:
    """Characters of several tokens appear whole; one that is never completed does not appear; blanks stay."""
    tokenizers = pytest.importorskip("tokenizers")
    m = llm.load(speaker(tmp_path / "m.gguf"), threads=1, capacity=8)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    t = tokenizers.Tokenizer(tokenizers.models.BPE({s: i for i, s in enumerate(letters)}, []))
    t.pre_tokenizer, t.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    m._tokenizer = t
    for text in ("a😀b", "日本語", "e\u0301 x  y", "\u00e9\n", "👨‍👩‍👧"):
        ids = t.encode(text).ids
        assert list(m.stream_text(ids)) == list(text)
        for n in range(len(ids)):
            got = "".join(m.stream_text(ids[:n]))
            assert text.startswith(got) and len(got.encode()) > n - 4, (text, n)
            assert got + "".join(m.stream_text(ids[n:], ids[:n])) == text
    broken = [*t.encode("😀").ids[:2], *t.encode("ab").ids]
    assert "".join(m.stream_text(broken)) == "\ufffdab"


def test_streams_of_pieces(tmp_path: Path) -> None:
    """SentencePiece: a blank before the first word of a continuation stays, one before an answer does not appear."""
    tokenizers = pytest.importorskip("tokenizers")
    m = llm.load(speaker(tmp_path / "m.gguf"), threads=1, capacity=8)
    t = tokenizers.Tokenizer(tokenizers.models.BPE({s: i for i, s in enumerate(["<s>", "\u2581", "a", "\u2581a", "b"])}, [("\u2581", "a")]))
    dec = tokenizers.decoders
    t.decoder = dec.Sequence([dec.Replace("\u2581", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)])
    t.add_special_tokens(["<s>"])
    m._tokenizer = t
    assert list(m.stream_text([3, 3, 1, 1, 3, 4], [0, 3])) == [" a", " a", " ", " ", " a", "b"]
    assert "".join(m.stream_text([3, 3, 1, 3], [0])) == "a a  a"


def test_chats_without_a_template(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    m = llm.load(speaker(tmp_path / "m.gguf", None), threads=1, capacity=16)
    with pytest.raises(InvalidModel, match="has no chat template"):
        list(m.generate("a", chat=True))


def test_on_the_command_line(tmp_path: Path) -> None:
    """The file's template, its default system message with it, from the file and from a saved model."""
    pytest.importorskip("tokenizers")
    path = speaker(tmp_path / "m.gguf", "{{ bos_token }}{% if messages[0].role != 'system' %}{{ 'sys ' }}{% endif %}{{ messages[0].content }}")
    m = llm.load(path, threads=1)
    assert m.chat_prompt("abc") == "<s>sys abc"
    want = "".join(m.generate("<s>sys abc", 6))
    made = CliRunner().invoke(luthier_command, ["compile", str(path), "-o", str(tmp_path / "made")])
    assert made.exit_code == 0, made.output
    for source in (path, tmp_path / "made"):
        done = CliRunner().invoke(luthier_command, ["generate", str(source), "abc", "--chat", "-n", "6", "--threads", "1"])
        assert done.exit_code == 0 and done.stdout == want + "\n", done.output


def test_configurations_of_exports(tmp_path: Path) -> None:
    """Templates, texts of tokens and marks of the files beside an ONNX export."""
    from luthier.llm.onnx_models import read_settings

    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ bos_token }}x", "bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert read_settings(tmp_path)["chat"] == {"template": "{{ bos_token }}x", "bos_token": "<s>", "eos_token": "</s>"} and read_settings(tmp_path)["end"] == [5]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 9, "content": "<|im_end|>"}, {"id": 8, "content": "<|other|>"}]}))
    (tmp_path / "chat_template.jinja").write_text("from the file")
    got = read_settings(tmp_path)
    assert got["chat"]["template"] == "from the file" and got["end"] == [5, 9]
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]}))
    assert read_settings(tmp_path)["chat"] == {"template": "yes"}
