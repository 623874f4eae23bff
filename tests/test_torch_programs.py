"""Torch programs: what ``torch.export`` and ``torch.compile`` give, against eager torch."""

from __future__ import annotations

import importlib.util
import math
import random
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'luthier[torch]'")
from torch import nn  # noqa: E402
from torch.export import Dim  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

import luthier  # noqa: E402
from luthier.torch_backend import luthier as backend  # noqa: E402

F = nn.functional


class Fn(nn.Module):
    def __init__(self, f: Any, *modules: nn.Module, **buffers: torch.Tensor) -> None:
        super().__init__()
        self.f, self.m = f, nn.ModuleList(modules)
        for name, b in buffers.items():
            self.register_buffer(name, b)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.f(self, *args, **kwargs)


def agree(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    a, b = pytree.tree_leaves(got), pytree.tree_leaves(want)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if isinstance(y, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert x == y


def seeded(m: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in m.parameters():
        nn.init.normal_(p, std=0.3)
    return m.eval()


# ---------------------------------------------------------------- export


def test_open_lengths_nested_arguments_and_results() -> None:
    m = seeded(Fn(lambda s, x, d: {"a": s.m[0](x), "b": (x.shape[0] * 2, [d["k"] + x.sum(), None])}, nn.Linear(8, 4)))
    batch = Dim("batch", min=1, max=64)
    x, k = torch.randn(5, 8), torch.randn(3)
    c = luthier.compile(m, args=(x, {"k": k}), dynamic_shapes=(({0: batch}, {"k": None}),))
    for n in (5, 1, 17):
        x = torch.randn(n, 8)
        agree(c(x, {"k": k}), m(x, {"k": k}))


def test_writes_through_views_are_seen_by_all_views() -> None:
    def f(s: Any, x: torch.Tensor) -> Any:
        y = x.clone()
        rows = y[1:3]
        columns = y.transpose(0, 1)[2:]
        rows[:, 0] = 7.0
        columns.mul_(2)
        y.view(-1)[::3] += 1
        y.diagonal().zero_()
        return y, rows, columns, rows.sum()

    x = torch.randn(4, 6)
    agree(luthier.compile(Fn(f), args=(x,))(x), f(None, x))


def test_buffers_begin_with_their_values_and_keep_their_changes() -> None:
    def f(s: Any, x: torch.Tensor) -> torch.Tensor:
        s.count.add_(1)
        s.cache[:, 1:3].copy_(x)
        return s.cache.sum(0) * s.count

    m = Fn(f, count=torch.tensor(3.0), cache=torch.arange(8.0).reshape(2, 4))
    compiled = luthier.compile(Fn(f, count=torch.tensor(3.0), cache=torch.arange(8.0).reshape(2, 4)), args=(torch.zeros(2, 2),))
    for _ in range(3):
        x = torch.randn(2, 2)
        agree(compiled(x), m(x))
    np.testing.assert_allclose(compiled.state["b_cache"], m.cache.numpy())


def test_inputs_that_the_program_changes_are_changed() -> None:
    def f(s: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(y)
        return x * 2

    x, y = torch.randn(3), torch.randn(3)
    a, b = x.clone(), x.clone()
    agree(luthier.compile(Fn(f), args=(x.clone(), y))(a, y), f(None, b, y))
    agree(a, b)


class Attending(nn.Module):
    """One head over a cache of fixed capacity; ``early``: reads the cache before it writes to it."""

    def __init__(self, early: bool = False) -> None:
        super().__init__()
        self.early = early
        self.register_buffer("keys", torch.zeros(1, 2, 8, 4))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.keys.sum() if self.early else torch.zeros(())
        at = torch.arange(x.shape[2]) + self.filled
        self.keys.index_copy_(2, at, x)
        self.filled.add_(x.shape[2])
        return (self.keys * (torch.arange(8) < self.filled)[:, None]).sum(2) + before


@pytest.mark.parametrize("early", [False, True])
def test_rows_are_written_into_a_cache_in_place(early: bool) -> None:
    m, c = Attending(early), luthier.compile(Attending(early), args=(torch.zeros(1, 2, 1, 4),))
    for _ in range(4):
        x = torch.randn(1, 2, 1, 4)
        agree(c(x), m(x))
    np.testing.assert_allclose(c.state["b_keys"], m.keys.numpy())
    moved = sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in c.module.outputs)
    assert moved == 2 * 4 * 4 + 8 + (early and 2 * 8 * 4 * 4)  # the result and the counter; the cache too where its old value is read


def test_an_input_that_is_no_array_of_its_own_is_written_to() -> None:
    def f(s: Any, cache: torch.Tensor, at: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, at, x)
        return cache.sum(0)

    at, x, a, b = torch.tensor([3, 1]), torch.randn(2, 4), torch.zeros(4, 6).T, torch.zeros(4, 6).T
    c = luthier.compile(Fn(f), args=(torch.zeros(6, 4), at, x))
    agree(c(a, at, x), f(None, b, at, x))
    agree(a, b)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_generation_with_a_static_cache_gives_eagers_tokens(name: str) -> None:
    if importlib.util.find_spec("torchvision"):  # beside a torch without its extension it asks for these
        schemas = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, op):
                schemas.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    config = {
        "llama": small | {"max_position_embeddings": 64}, "qwen3": small | {"head_dim": 16, "max_position_embeddings": 64},
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    }[name]  # fmt: skip
    torch._dynamo.reset()
    torch.manual_seed(0)
    m = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, vocab_size=200, **config)).eval()
    ids = torch.randint(3, 200, (1, 6))
    how = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0, "disable_compile": True}
    want = m.generate(ids, **how)
    m.forward = torch.compile(m.forward, backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="luthier")
        assert torch.equal(m.generate(ids, **how), want)


def test_positions_that_depend_on_data() -> None:
    def f(s: Any, x: torch.Tensor) -> Any:
        return x[x > 0].sum(), torch.nonzero(x)

    m = Fn(f)
    x = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    c = luthier.compile(m, args=(x,))
    for y in (x, torch.tensor([[-1.0, -1.0], [3.0, 4.0]])):
        agree(c(y), f(None, y))


@pytest.mark.parametrize("target", ["cpu", "wasm"])
def test_a_transformer_block_and_a_convolutional_one(target: str) -> None:
    layer = seeded(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True))
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        agree(luthier.compile(layer, target, args=(x,))(x), layer(x), 1e-4)
    conv = seeded(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.AdaptiveAvgPool2d(5)))
    y = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        agree(luthier.compile(conv, target, args=(y,))(y), conv(y), 1e-4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("both", [False, True])
def test_recurrent_networks(kind: Any, both: bool) -> None:
    m = seeded(kind(6, 5, num_layers=2, bidirectional=both, batch_first=True))
    x = torch.randn(2, 7, 6)
    with torch.no_grad():
        agree(luthier.compile(m, args=(x,))(x), m(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_types_stay(dtype: torch.dtype) -> None:
    m = Fn(lambda s, x, y: (x + y, x * 2, x.sum(), (x > y), x.float()))
    x, y = (torch.randint(-8, 8, (3, 4)).to(dtype) for _ in range(2))
    agree(luthier.compile(m, args=(x, y))(x, y), m(x, y))


def test_all_missing_operators_are_named_with_the_users_lines() -> None:
    m = Fn(lambda s, x: (torch.linalg.ldl_factor(x)[0], torch.hash_tensor(x).to(torch.float32)))
    with pytest.raises(luthier.LuthierError) as error:
        luthier.compile(m, args=(torch.randn(3, 3),))
    text = str(error.value)
    assert "ldl_factor" in text and "hash_tensor" in text and "test_torch_programs.py" in text


def test_a_module_needs_arguments_and_calls_need_the_same_structure() -> None:
    with pytest.raises(luthier.LuthierError, match="example arguments"):
        luthier.compile(nn.Linear(2, 2))
    c = luthier.compile(nn.Linear(2, 2), args=(torch.zeros(1, 2),))
    with pytest.raises(luthier.LuthierError, match="nested otherwise"):
        c(torch.zeros(1, 2), torch.zeros(1, 2))


def test_arguments_that_do_not_belong_are_refused() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(luthier.LuthierError, match="are for models in ONNX"):
        luthier.compile(nn.Linear(2, 2), args=(x,), shapes={"x": (1, 2)})
    with pytest.raises(luthier.LuthierError, match="are for torch programs"):
        luthier.compile("model.onnx", args=(x,))
    program = torch.export.export(nn.Linear(2, 2), (x,))
    with pytest.raises(luthier.LuthierError, match="has its arguments"):
        luthier.compile(program, args=(x,))


def test_the_module_stays_in_its_mode_and_training_is_refused() -> None:
    m = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    with pytest.raises(luthier.LuthierError, match="eval"):
        luthier.compile(m, args=(torch.zeros(1, 2),))
    assert m.training


# ---------------------------------------------------------------- torch.compile


def test_backend_over_batch_sizes_and_changed_parameters() -> None:
    torch._dynamo.reset()
    m = seeded(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    c = torch.compile(m, backend=backend)
    with torch.no_grad():
        for n in (1, 3, 5, 9):
            x = torch.randn(n, 16)
            agree(c(x), m(x))
        m[0].weight.mul_(2)
        agree(c(x), m(x))


def test_backend_gradients() -> None:
    torch._dynamo.reset()
    m = seeded(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3)))
    x = torch.randn(4, 8)
    grads = []
    for f in (m, torch.compile(m, backend=backend)):
        m.zero_grad()
        y = x.clone().requires_grad_()
        F.cross_entropy(f(y), torch.tensor([0, 1, 2, 0])).backward()
        grads.append([y.grad, *(p.grad.clone() for p in m.parameters())])
    agree(grads[1], grads[0])


def test_backend_falls_back_with_one_warning_that_names_the_operators() -> None:
    torch._dynamo.reset()
    c = torch.compile(lambda x: torch.linalg.ldl_factor(x @ x.T)[0], backend=backend)
    x = torch.randn(3, 3)
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        agree(c(x), torch.linalg.ldl_factor(x @ x.T)[0])
        c(x)
    ours = [str(w.message) for w in seen if "luthier" in str(w.message)]
    assert len(ours) == 1 and "ldl_factor" in ours[0]


def test_backend_changes_inputs_in_place_and_refuses_unknown_options() -> None:
    torch._dynamo.reset()

    def f(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache[:, 1] = x
        return cache.sum() + x

    x, a, b = torch.randn(3), torch.zeros(3, 4), torch.zeros(3, 4)
    with torch.no_grad():
        agree(torch.compile(f, backend=backend)(x, a), f(x, b))
    agree(a, b)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no option 'speed'"):
        torch.compile(f, backend=backend, options={"speed": 9})(x, a)


# ---------------------------------------------------------------- torch's own samples

SEED, COUNT = 3, 45


def test_a_sample_of_torchs_operators_equals_eager() -> None:
    pytest.importorskip("expecttest")
    from benchmarks.torch_opdb import check, name_of, op_db

    chosen = random.Random(SEED).sample(list(op_db), COUNT)
    rows = [check(op, torch.float32, 2) for op in chosen if torch.float32 in op.dtypes]
    assert not [r for r in rows if r["status"] in ("wrong", "crash")], [name_of(op) for op in chosen]
    counted = [r for r in rows if r["status"] in ("pass", "refused")]
    assert sum(r["status"] == "pass" for r in counted) >= 0.9 * len(counted) and len(counted) >= 30
