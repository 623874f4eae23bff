"""Files of torch programs and of weights, read without running what is in them: ``.pt2`` archives, ``.safetensors``, ``.pt`` with tensors only.

torch's own reader unpickles some entries and evaluates the expressions of sizes: an archive with pickled tensors or objects is refused, sample
inputs must be what ``weights_only`` allows, and an expression may only be calls of the functions that sizes are made of.
"""

from __future__ import annotations

import ast
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._sympy import functions

from luthier.ir.errors import InvalidModel

_SIZES = set(functions.__all__) | set(
    "Symbol Integer Float Rational Add Mul Pow Max Min Mod Equality Unequality LessThan StrictLessThan GreaterThan StrictGreaterThan And Or Not".split()
)
_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def load_program(path: str) -> torch.export.ExportedProgram:
    """A program that ``torch.export.save`` wrote. Raises InvalidModel for what is no such archive, or would run code as it is read."""
    try:
        with open(path, "rb") as f:
            raw = f.read()
        with zipfile.ZipFile(io.BytesIO(raw)) as z:
            names = z.namelist()
            if len(set(names)) != len(names):
                raise InvalidModel(f"{path} has an entry twice")
            for name in names:
                if name.endswith(".json"):
                    for key, value in _fields(json.loads(z.read(name))):
                        _check(path, name, key, value)
                elif "/sample_inputs/" in name:
                    torch.load(io.BytesIO(z.read(name)), weights_only=True)
        return torch.export.load(io.BytesIO(raw))
    except (OSError, InvalidModel):
        raise
    except Exception as error:  # of zipfile, json and torch, of many types
        raise InvalidModel(f"{path} is no archive of torch.export that can be read: {error}", hint="torch.export.save(program, path)") from error


def _fields(x: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(x, dict):
        for k, v in x.items():
            yield k, v
            yield from _fields(v)
    elif isinstance(x, list):
        for v in x:
            yield from _fields(v)


def _check(path: str, name: str, key: str, value: Any) -> None:
    if key == "use_pickle" and value:
        raise InvalidModel(f"{path}: {name} says that weights are pickled, which would run code", hint="save plain tensors")
    if key == "expr_str" and not _is_size(value):
        raise InvalidModel(f"{path}: {name} has the size {value!r}, which is no expression of sizes")


def _is_size(text: Any) -> bool:
    """Whether an expression is calls of functions of sizes, of numbers and of named symbols."""
    def fine(n: ast.AST, in_symbol: bool = False) -> bool:
        if isinstance(n, ast.Constant):
            return isinstance(n.value, (bool, int, float)) or in_symbol and isinstance(n.value, str) and n.value.replace(".", "").replace("-", "").isidentifier()
        if isinstance(n, ast.UnaryOp):
            return isinstance(n.op, ast.USub) and fine(n.operand)
        if isinstance(n, ast.Name):
            return n.id in ("true", "false")
        if not isinstance(n, ast.Call) or not isinstance(n.func, ast.Name) or n.func.id not in _SIZES:
            return False
        if n.func.id == "Float":
            return all(isinstance(a, ast.Constant) and _is_number(a.value) for a in [*n.args, *(k.value for k in n.keywords)])
        return all(fine(a, n.func.id == "Symbol") for a in n.args) and all(isinstance(k.value, ast.Constant) for k in n.keywords)

    try:
        return isinstance(text, str) and fine(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        return False


def _is_number(v: Any) -> bool:
    try:
        float(v)
    except (TypeError, ValueError):
        return False
    return True


def load_weights(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """{name: tensor} of a ``.safetensors`` file, mapped, or of a ``.pt`` file that holds tensors only. Raises InvalidModel."""
    p = os.fspath(path)
    try:
        if p.endswith(".safetensors"):
            return _safetensors(p)
        found = torch.load(p, map_location="cpu", weights_only=True)
    except (OSError, InvalidModel):
        raise
    except Exception as error:
        raise InvalidModel(f"{p} holds more than tensors, or is no file of weights: {error}", hint="save model.state_dict()") from error
    if not isinstance(found, Mapping) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise InvalidModel(f"{p} is no dictionary of tensors", hint="save model.state_dict()")
    return dict(found)


def _safetensors(path: str) -> dict[str, torch.Tensor]:
    """A length u64, that many bytes of JSON {name: {dtype, shape, data_offsets}}, the elements; source: the format's documentation."""
    raw = np.memmap(path, np.uint8, "c")
    head = int(raw[:8].view("<u8")[0]) if raw.size >= 8 else raw.size
    if head + 8 > raw.size:
        raise InvalidModel(f"{path} ends within its header")
    out = {}
    for name, d in json.loads(bytes(raw[8 : 8 + head])).items():
        if name == "__metadata__":
            continue
        first, last = d["data_offsets"]
        if d["dtype"] not in _SAFETENSORS or not 0 <= first <= last <= raw.size - head - 8:
            raise InvalidModel(f"{path}: {name} has the type {d['dtype']} at {d['data_offsets']}, which cannot be read")
        part = torch.from_numpy(np.array(raw[8 + head + first : 8 + head + last]))
        out[name] = part.view(_SAFETENSORS[d["dtype"]]).reshape(d["shape"])
    return out


def with_weights(tensors: dict[str, Any], weights: str | os.PathLike[str]) -> dict[str, Any]:
    """A state dictionary with the tensors of a file in place of its own, by name. Raises InvalidModel for names and shapes that differ."""
    given = load_weights(weights)
    missing, more = sorted(tensors.keys() - given.keys()), sorted(given.keys() - tensors.keys())
    if missing or more:
        raise InvalidModel(
            f"the weights do not fit the program: {len(missing)} are missing ({', '.join(missing[:3])}), {len(more)} are unknown ({', '.join(more[:3])})",
            hint="their names are those of the module's state_dict()",
        )
    for name, t in given.items():
        if t.shape != tensors[name].shape or t.dtype != tensors[name].dtype:
            raise InvalidModel(f"weight {name} is {t.dtype}{list(t.shape)} in the file, {tensors[name].dtype}{list(tensors[name].shape)} in the program")
    return given
