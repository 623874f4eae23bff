"""Error messages, settings, and arrays for inputs."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import luthier.ir.errors
from luthier import errors, settings
from luthier.errors import InputError, LuthierError, SettingError, ShapeError
from luthier.feeds import random_inputs, read_inputs


def test_message_names_everything_in_one_line() -> None:
    error = ShapeError("inner dimensions\ndiffer", node="fc1", op="MatMul", shapes={"A": (2, "n"), "B": [4, 5]}, hint="transpose B")
    assert str(error) == 'inner dimensions differ; node "fc1" (MatMul); shapes A [2, n], B [4, 5]; to do: transpose B'


def test_message_without_details() -> None:
    assert str(LuthierError("no")) == "no"
    assert str(LuthierError("no", op="Conv")) == "no; operator Conv"
    assert str(LuthierError("no", shapes=[(1, 2), ()])) == "no; shapes [1, 2], []"


def test_at_keeps_the_innermost_knowledge() -> None:
    error = ShapeError("no", node="inner").at(node="outer", op="Conv", shapes={"x": (1,)}, hint="look")
    assert str(error) == 'no; node "inner" (Conv); shapes x [1]; to do: look'


def test_errors_cross_processes() -> None:
    error = ShapeError("no", node="n", op="Conv", shapes={"x": (1, 2)}, hint="h")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ShapeError and str(copy) == str(error) and copy.op == "Conv"


def test_ir_errors_are_the_same_classes() -> None:
    assert all(getattr(luthier.ir.errors, name) is getattr(errors, name) for name in errors.__all__)


def test_settings_parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LUTHIER_THREADS", raising=False)
    assert settings.threads.get() is None and not settings.threads.is_set()
    monkeypatch.setenv("LUTHIER_THREADS", " 3 ")
    assert settings.threads.get() == 3 and settings.threads.is_set()
    monkeypatch.setenv("LUTHIER_CACHE_DIR", str(tmp_path))
    assert settings.cache_dir.get() == tmp_path


@pytest.mark.parametrize(("name", "value"), [("LUTHIER_THREADS", "0"), ("LUTHIER_THREADS", "many"), ("LUTHIER_DEBUG", "maybe")])
def test_a_bad_setting_names_itself(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    setting = next(s for s in settings.all_settings() if s.name == name)
    with pytest.raises(SettingError, match=f"{name}='{value}'"):
        setting.get()


@dataclass
class Spec:
    name: str
    dtype: str
    shape: tuple[int | str, ...]
    optional: bool = False


SPECS = [Spec("ids", "int64", ("batch", "length")), Spec("mask", "bool", ("batch", "length")), Spec("x", "float32", ("batch", 4))]


def test_random_inputs_agree_on_names() -> None:
    feeds = random_inputs(SPECS, {"ids": (2, 7)}, seed=1)
    assert {k: v.shape for k, v in feeds.items()} == {"ids": (2, 7), "mask": (2, 7), "x": (2, 4)}
    assert {k: v.dtype.name for k, v in feeds.items()} == {"ids": "int64", "mask": "bool", "x": "float32"}
    again = random_inputs(SPECS, {"ids": (2, 7)}, seed=1)
    assert all((feeds[k] == again[k]).all() for k in feeds)


def test_given_arrays_decide_extents(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 4), np.float32))
    given = read_inputs(SPECS, [f"x={tmp_path / 'x.npy'}"])
    feeds = random_inputs(SPECS, {}, given=given)
    assert feeds["ids"].shape == (3, 1) and (feeds["x"] == 1).all()


def test_npz_and_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 4), np.float32))
    np.save(tmp_path / "first.npy", np.zeros((1, 2), np.int64))
    found = read_inputs(SPECS, [str(tmp_path / "a.npz"), str(tmp_path / "first.npy")])
    assert sorted(found) == ["ids", "x"] and found["ids"].shape == (1, 2)


def test_input_errors(tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_text("no array")
    with pytest.raises(InputError, match="cannot read"):
        read_inputs(SPECS, [str(tmp_path / "bad.npy")])
    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(InputError, match='no input "z"'):
        read_inputs(SPECS, [f"z={tmp_path / 'x.npy'}"])
    with pytest.raises(InputError, match="has rank 2"):
        random_inputs(SPECS, {"x": (1, 2, 3)})
