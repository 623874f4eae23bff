"""Arrays of other libraries go in and out by DLPack without a copy: the module is given the very address of the producer's memory."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import ml_dtypes
import numpy as np
import onnx.parser
import pytest

import luthier
from luthier.dlpack import Deleter, Tensor, Versioned, from_capsule, python, view
from luthier.errors import InputError
from luthier.module import Module

_new_capsule = python("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
NAME = b"dltensor_versioned"


class Wrapped:
    """Another library's array, whose memory numpy allocated. ``device``: what it says about itself."""

    def __init__(self, a: np.ndarray[Any, Any], device: tuple[int, int] = (1, 0)) -> None:
        self.a, self.device, self.taken = a, device, 0

    def __dlpack__(self, **options: Any) -> Any:
        self.taken += 1
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


class Raw:
    """A producer written against the specification: any element type, read-only or not, counts how often it was released."""

    def __init__(self, memory: np.ndarray[Any, Any], code: int, bits: int, read_only: bool = False, lanes: int = 1, major: int = 1) -> None:
        self.memory, self.released = memory, 0
        self.shape = (ctypes.c_int64 * memory.ndim)(*memory.shape)
        self.strides = (ctypes.c_int64 * memory.ndim)(*(s // memory.itemsize for s in memory.strides))
        self.deleter = Deleter(self.release)
        self.managed = Versioned(major, 0, None, ctypes.cast(self.deleter, ctypes.c_void_p), int(read_only))
        self.managed.tensor = Tensor(memory.ctypes.data, 1, 0, memory.ndim, code, bits, lanes, self.shape, self.strides, 0)

    def release(self, ptr: int) -> None:
        self.released += 1

    def __dlpack__(self, **options: Any) -> Any:
        return _new_capsule(ctypes.addressof(self.managed), NAME, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def compiled(dtype: str = "float") -> Module:
    return luthier.compile(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20]>\ng ({dtype}[N, 4] x) => ({dtype}[N, 4] y) {{ y = Add(x, x) }}'))


@pytest.fixture(scope="module")
def doubles() -> Module:
    return compiled()


def address_given(module: Module) -> int:
    """The address that the last call passed for input 0."""
    return int(module._idle[-1].ins[0])


def sample(n: int = 5) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32)


def test_input_is_not_copied(doubles: Module) -> None:
    a = sample()
    w = Wrapped(a)
    np.testing.assert_array_equal(doubles.run({"x": w})["y"], a + a)
    assert w.taken == 1 and address_given(doubles) == a.ctypes.data
    (y,) = doubles(Wrapped(a[1:4]))  # a part of a larger array
    np.testing.assert_array_equal(y, 2 * a[1:4])
    assert address_given(doubles) == a.ctypes.data + 16


def test_changes_of_the_producer_are_seen(doubles: Module) -> None:
    a = sample()
    w = Wrapped(a)
    doubles.run({"x": w})
    a[:] = 3
    np.testing.assert_array_equal(doubles.run({"x": w})["y"], np.full((5, 4), 6, np.float32))


@pytest.mark.parametrize("cut", [np.s_[:, ::2], np.s_[::-1, :4], np.s_[1::2, 2:6]], ids=str)
def test_strided_inputs_are_made_contiguous(doubles: Module, cut: Any) -> None:
    a = np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)[cut]
    np.testing.assert_array_equal(doubles.run({"x": Wrapped(a)})["y"], a + a)
    np.testing.assert_array_equal(doubles.run({"x": Wrapped(np.asfortranarray(a))})["y"], a + a)


def test_read_only_input(doubles: Module) -> None:
    a = sample()
    a.flags.writeable = False
    np.testing.assert_array_equal(doubles.run({"x": Wrapped(a)})["y"], a + a)
    assert address_given(doubles) == a.ctypes.data
    with pytest.raises(InputError, match=r"out\['y'\] must be a writable contiguous array"):
        doubles.run({"x": sample()}, out={"y": Wrapped(a)})


@pytest.mark.parametrize(("device", "where"), [((2, 1), "cuda:1"), ((8, 0), "metal:0"), ((99, 0), "device type 99:0")])
def test_memory_of_another_device_is_refused(doubles: Module, device: tuple[int, int], where: str) -> None:
    w = Wrapped(sample(), device)
    with pytest.raises(InputError, match=f"input x: this Wrapped lies on {where}.*copy it to the CPU"):
        doubles.run({"x": w})
    with pytest.raises(InputError, match="lies on"):
        doubles.run({"x": sample()}, out={"y": w})
    assert w.taken == 0


def test_wrong_dtype_rank_and_extent(doubles: Module) -> None:
    with pytest.raises(InputError, match="dtype float64, expected float32"):
        doubles.run({"x": Wrapped(sample().astype(np.float64))})
    with pytest.raises(InputError, match="rank 1, expected 2"):
        doubles.run({"x": Wrapped(sample()[0])})
    with pytest.raises(InputError, match="dimension 1 is 3, expected 4"):
        doubles.run({"x": Wrapped(np.ascontiguousarray(sample()[:, :3]))})


def test_no_dlpack_at_all(doubles: Module) -> None:
    class Half:
        def __dlpack__(self) -> Any:
            raise BufferError("not today")

    with pytest.raises(InputError, match="does not say where"):
        doubles.run({"x": Half()})
    Half.__dlpack_device__ = lambda self: (1, 0)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="not today"):
        doubles.run({"x": Half()})


# ---------------------------------------------------------------- types that numpy does not have


def test_bfloat16_comes_in_without_a_copy() -> None:
    module = compiled("bfloat16")
    a = sample().astype(ml_dtypes.bfloat16)
    raw = Raw(a, 4, 16)
    np.testing.assert_array_equal(module.run({"x": raw})["y"].astype(np.float32), (a.astype(np.float32) * 2))
    assert address_given(module) == a.ctypes.data
    gc.collect()
    assert raw.released == 1


def test_views_keep_the_memory_and_release_it_once() -> None:
    raw = Raw(sample().astype(ml_dtypes.float8_e5m2), 12, 8, read_only=True)
    v = view(raw, "t")
    part = v[1:, 2]
    assert v.dtype == ml_dtypes.float8_e5m2 and v.ctypes.data == raw.memory.ctypes.data and not v.flags.writeable
    del v
    gc.collect()
    assert raw.released == 0
    np.testing.assert_array_equal(part, raw.memory[1:, 2])
    del part
    gc.collect()
    assert raw.released == 1


def test_strides_and_empty_tensors() -> None:
    a = np.arange(24).astype(ml_dtypes.bfloat16).reshape(4, 6)
    raw = Raw(a[::2, 1:4], 4, 16)
    np.testing.assert_array_equal(view(raw, "t"), a[::2, 1:4])
    none = Raw(a[:0], 4, 16)
    assert view(none, "t").shape == (0, 6)
    gc.collect()
    assert none.released == 1 and raw.released == 1


def test_what_has_no_numpy_type_is_refused() -> None:
    for raw, message in ((Raw(sample(), 4, 16, lanes=2), "2 lanes"), (Raw(sample(), 77, 16), "DLPack type 77"), (Raw(sample().astype(ml_dtypes.bfloat16), 4, 16, major=2), "DLPack 2.0")):
        with pytest.raises(InputError, match=f"t: this Raw .*{message}"):
            view(raw, "t")


def test_a_capsule_is_used_once() -> None:
    raw = Raw(sample().astype(ml_dtypes.bfloat16), 4, 16)
    capsule = raw.__dlpack__()
    first = from_capsule(capsule, "it")
    with pytest.raises(InputError, match="used before"):
        from_capsule(capsule, "it")
    assert first.shape == (5, 4) and raw.released == 0


# ---------------------------------------------------------------- outputs


def test_outputs_are_exporters(doubles: Module) -> None:
    y = doubles.run({"x": sample()})["y"]
    other = np.from_dlpack(y)
    assert other.ctypes.data == y.ctypes.data and other.flags.writeable
    assert y.__dlpack_device__() == (1, 0)


def test_out_is_written_in_place(doubles: Module) -> None:
    memory = np.zeros((5, 4), np.float32)
    w = Wrapped(memory)
    result = doubles.run({"x": sample()}, out={"y": w})
    assert result["y"] is w
    np.testing.assert_array_equal(memory, 2 * sample())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((4, 4), np.float32), r"shape \[4, 4\], the output has \[5, 4\]"), (np.zeros((5, 4)), "array of float32"),
        (np.zeros((4, 5), np.float32).T, "contiguous"), (Wrapped(np.zeros((5, 8), np.float32)[:, ::2]), "contiguous"), ([0.0], "contiguous array"),
    ],
)  # fmt: skip
def test_out_that_does_not_fit(doubles: Module, out: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        doubles.run({"x": sample()}, out={"y": out})


def test_out_of_an_unknown_name_and_out_over_an_input(doubles: Module) -> None:
    with pytest.raises(InputError, match="no output 'z'.*the outputs are y"):
        doubles.run({"x": sample()}, out={"z": np.zeros((5, 4), np.float32)})
    a = sample()
    with pytest.raises(InputError, match="shares memory with an input"):
        doubles.run({"x": a}, out={"y": a})


# ---------------------------------------------------------------- torch


def test_torch_in_and_out(doubles: Module) -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(5, 4)
    y = doubles.run({"x": x})["y"]
    assert address_given(doubles) == x.data_ptr()
    back = torch.from_dlpack(y)
    assert back.data_ptr() == y.ctypes.data and torch.equal(back, x + x)
    out = torch.empty(5, 4)
    assert doubles.run({"x": x}, out={"y": out})["y"] is out and torch.equal(out, x + x)
    assert torch.equal(torch.from_dlpack(doubles.run({"x": x.t().contiguous().t()})["y"]), x + x)
    half = torch.randn(5, 4).to(torch.bfloat16)
    module = compiled("bfloat16")
    got = module.run({"x": half})["y"]
    assert address_given(module) == half.data_ptr()
    assert torch.equal(torch.from_numpy(got.astype(np.float32)), (half + half).float())
    with pytest.raises(InputError, match="requires gradient|requires_grad|detach"):
        doubles.run({"x": torch.randn(5, 4, requires_grad=True)})
