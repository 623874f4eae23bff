"""Graphs back to ONNX, so that other runtimes can run what was quantized here.

``portable``: low-bit products become com.microsoft::MatMulNBits (2, 4 or 8 bits: narrower codes are stored in the next width that
onnxruntime has, with the same values), or DequantizeLinear in front of MatMul where its block sizes do not fit; group-sparse products become
the same with dropped blocks stored as zeros. ``luthier``: they stay luthier::GroupedMatMul and luthier::SparseMatMul, which only this package
reads, in their own bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

from luthier.errors import InputError, UnsupportedOperator
from luthier.importers.onnx.tensors import ELEMENT
from luthier.ir.graph import Graph, Node, TensorType, Value
from luthier.ir.ops.common import need
from luthier.ir.ops.lowbit import pack_bits, unpack_bits
from luthier.ir.ops.lowbit_matmul import unpack_trits
from luthier.ir.ops.two_of_four import unpack_two_of_four
from luthier.passes.graph.densify_sparse import dense_form

__all__ = ["FORMS", "OPSET", "export_onnx", "save_onnx"]

Array = np.ndarray[Any, Any]
FORMS = ("portable", "luthier")
OPSET = 23  # attributes of the graph follow the newest version; these operators did not change since
_CODE = {d: code for code, d in ELEMENT.items()}
_GROUPED = "luthier::GroupedMatMul"


def export_onnx(graph: Graph, form: str = "portable", opset: int = OPSET) -> ModelProto:
    """The graph as a model: what ``import_onnx`` gave, with quantization passes applied, but before the pipeline's passes.

    Raises InputError for an unknown form, UnsupportedOperator for an operator that ONNX does not have."""
    if form not in FORMS:
        raise InputError(f"unknown form {form!r}", hint=f"choose one of {', '.join(FORMS)}")
    writer = _Writer(form, opset)
    body = writer.graph(graph, top=True)
    imports = [helper.make_opsetid("", opset)] + [helper.make_opsetid(d, 1) for d in sorted(writer.domains)]
    return helper.make_model(body, opset_imports=imports, producer_name="luthier", ir_version=10)


def save_onnx(graph: Graph, path: str | Path, form: str = "portable") -> Path:
    """Write :func:`export_onnx`'s model; constants beside it in PATH.data when the model exceeds 1.5 GB. The file appears whole or not at
    all. Raises InputError when it cannot be written."""
    path = Path(path)
    model = export_onnx(graph, form)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    large = sum(len(t.raw_data) for t in model.graph.initializer) > 1_500_000_000
    try:
        if large:
            (path.parent / f"{path.name}.data").unlink(missing_ok=True)
            onnx.save(model, scratch, save_as_external_data=True, location=f"{path.name}.data")
        else:
            onnx.save(model, scratch)
        os.replace(scratch, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)
    return path


class _Writer:
    def __init__(self, form: str, opset: int) -> None:
        self.form, self.opset = form, opset
        self.domains: set[str] = set()
        self.serial = 0

    def graph(self, g: Graph, top: bool = False) -> onnx.GraphProto:
        nodes: list[onnx.NodeProto] = []
        constants: dict[str, onnx.TensorProto] = {}
        inner = {v for n in g.nodes for v in n.outputs} | set(g.inputs)
        for n in g.nodes:
            nodes += self.node(n, constants)
        names = {v.name for v in inner}
        outputs = []
        for name, v in g.results():
            if v.name != name or v.data is not None or v not in inner:
                if v.data is not None:
                    self.constant(v, constants)
                if name not in names:
                    nodes.append(helper.make_node("Identity", [v.name], [name], f"{name}.output"))
                    names.add(name)
            outputs.append(_info(name, v.type))
        return helper.make_graph(nodes, g.name or "model", [_info(v.name, v.type) for v in g.inputs], outputs, list(constants.values()))

    def constant(self, v: Value, constants: dict[str, onnx.TensorProto]) -> str:
        if v.name not in constants:
            assert v.data is not None
            constants[v.name] = _tensor(v.data, v.name)
        return v.name

    def reads(self, inputs: Iterable[Value | None], constants: dict[str, onnx.TensorProto]) -> list[str]:
        out = []
        for v in inputs:
            if v is not None and v.data is not None:
                self.constant(v, constants)
            out.append("" if v is None else v.name)
        return out

    def node(self, n: Node, constants: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
        if n.op == "luthier::Require":
            return [helper.make_node("Identity", self.reads(n.inputs[:1], constants), [n.outputs[0].name], n.name)]
        if n.op == _GROUPED and self.form == "portable":
            return self.grouped(n, constants)
        if n.op == "luthier::SparseMatMul" and self.form == "portable":
            return self.sparse(n, constants)
        if n.op == "luthier::TwoOfFourMatMul" and self.form == "portable":
            return self.two_of_four(n, constants)
        domain, _, op = n.op.rpartition("::")
        known = None
        if not domain:
            try:
                known = onnx.defs.get_schema(op, self.opset, "").attributes
            except onnx.defs.SchemaError:
                raise UnsupportedOperator(f"operator {n.op} cannot be written to opset {self.opset}", node=n.name, op=n.op) from None
        elif domain == "luthier" and self.form == "portable":
            raise UnsupportedOperator(f"operator {n.op} has no ONNX form", node=n.name, op=n.op, hint="save with form='luthier'")
        else:
            self.domains.add(domain)
        attrs = {}
        for key, value in n.attrs.items():
            if value is None or (known is not None and key not in known):
                continue
            if isinstance(value, Graph):
                value = self.graph(value)
            elif isinstance(value, (np.ndarray, np.generic)):
                value = _tensor(np.asarray(value), key)
            elif isinstance(value, tuple):
                value = list(value)
                if not value:  # the schema knows the type, an empty list does not
                    continue
            attrs[key] = value
        proto = helper.make_node(op, self.reads(n.inputs, constants), [v.name for v in n.outputs], n.name, domain=domain or None, **attrs)
        return [proto]

    def grouped(self, n: Node, constants: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
        """``luthier::GroupedMatMul`` in operators of onnxruntime, with the same weights."""
        raw, scale, zero, bias = (n.input(i) for i in range(1, 5))
        assert raw is not None and raw.data is not None and scale is not None and scale.data is not None
        k, bits, group = (int(n.attrs[a]) for a in ("K", "bits", "group"))
        codes = (unpack_bits(raw.data, bits)[:, :k] if bits else unpack_trits(raw.data, k)).astype(np.int32)
        return self.product(n, codes, scale.data.astype(np.float32), None if zero is None else zero.data, bias, k, group, constants)

    def sparse(self, n: Node, constants: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
        """``luthier::SparseMatMul`` as a dense product whose groups are the blocks; dropped ones have scale 0."""
        codes, scales, zeros = dense_form(n)
        return self.product(n, codes.astype(np.int32), scales.astype(np.float32), zeros, n.input(6), int(n.attrs["K"]), int(n.attrs["block"]), constants)

    def two_of_four(self, n: Node, constants: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
        """``luthier::TwoOfFourMatMul`` as a dense product with zeros."""
        raw, scale = need(n, 1).data, need(n, 2).data
        if raw is None or scale is None:
            raise UnsupportedOperator(f"operator {n.op} with weights that are no constants has no ONNX form", node=n.name, op=n.op)
        k, bits, group = (int(n.attrs[a]) for a in ("K", "bits", "group"))
        middle = 1 << (bits - 1)
        codes = unpack_two_of_four(raw, k, bits) + middle
        return self.product(n, codes, scale.astype(np.float32), np.full(scale.shape, middle, np.uint8), n.input(3), k, group, constants)

    def product(
        self, n: Node, codes: Array, scales: Array, zero: Array | None, bias: Value | None, k: int, group: int, constants: dict[str, onnx.TensorProto]
    ) -> list[onnx.NodeProto]:
        """``codes`` i32 [rows, k], ``scales`` f32 and ``zero`` [rows, ceil(k / group)] as MatMulNBits, or DequantizeLinear and MatMul."""
        x, rows = n.inputs[0], len(codes)
        assert x is not None
        middle = float(n.attrs.get("zero", 0))
        if middle != int(middle):  # 1 bit: (q - 1/2) s = (2 q - 1) s / 2
            codes, scales, middle = 2 * codes, scales / 2, 2 * middle
        zeros = np.full(scales.shape, middle, np.float32) if zero is None else zero.astype(np.float32)
        if int(n.attrs.get("offset", 0)):
            zeros = -zeros / scales
        width = next(b for b in (2, 4, 8) if (1 << b) > max(int(codes.max(initial=0)), 1 if zeros.size == 0 else int(min(zeros.max(), 255))))
        fits = group >= 16 and group & (group - 1) == 0 and group <= 256
        whole = bool((zeros == np.rint(zeros)).all() and zeros.min(initial=0) >= 0 and zeros.max(initial=0) < (1 << width))
        dtype = np.float32 if x.dtype.name == "f32" else x.dtype.numpy
        y = n.outputs[0].name

        def const(part: str, data: Any) -> str:
            constants[f"{y}.{part}"] = _tensor(np.ascontiguousarray(data), f"{y}.{part}")
            return f"{y}.{part}"

        if fits:
            self.domains.add("com.microsoft")
            blocks = -(-k // group)
            codes = np.pad(codes, ((0, 0), (0, blocks * group - k)))
            packed = pack_bits(codes.reshape(rows, blocks, group).astype(np.uint8), width)
            ins = self.reads([x], constants) + [const("weights", packed), const("scales", scales.astype(dtype).reshape(rows, blocks))]
            if whole:
                z = pack_bits(zeros.astype(np.uint8), width)
                ins.append(const("zeros", z) if (zeros != 1 << (width - 1)).any() else "")
            else:
                ins.append(const("zeros", zeros.astype(dtype)))
            ins += ["", *self.reads([bias], constants)] if bias is not None else []
            while ins and not ins[-1]:
                ins.pop()
            level = {"accuracy_level": 4} if int(n.attrs.get("act_group", 0)) else {}
            return [helper.make_node("MatMulNBits", ins, [y], n.name, domain="com.microsoft", K=k, N=rows, bits=width, block_size=group, **level)]
        return self.dequantized(n, codes, scales, zeros, whole, group, bias, const, constants)

    def dequantized(self, n: Node, codes: Array, scales: Array, zeros: Array, whole: bool, group: int, bias: Value | None, const: Any, constants: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
        x, y = n.inputs[0], n.outputs[0].name
        assert x is not None
        k = codes.shape[1]
        dtype = x.dtype.numpy
        nodes = []
        attrs = {"axis": 1} if group == k else {"axis": 0, "block_size": group}
        flat = (lambda a: a.reshape(-1)) if group == k else (lambda a: a.T)
        ins = [const("weights", codes.T.astype(np.uint8)), const("scales", flat(scales).astype(dtype))]
        if whole:
            nodes.append(helper.make_node("DequantizeLinear", [*ins, const("zeros", flat(zeros).astype(np.uint8))], [f"{y}.w"], f"{n.name}.dequantize", **attrs))
        else:  # zero points with a fraction: q s - z s
            nodes.append(helper.make_node("DequantizeLinear", ins, [f"{y}.qs"], f"{n.name}.dequantize", **attrs))
            offset = np.repeat((-zeros * scales).T, group, 0)[:k] if group != k else (-zeros * scales).T
            nodes.append(helper.make_node("Add", [f"{y}.qs", const("offsets", offset.astype(dtype))], [f"{y}.w"], f"{n.name}.offset"))
        product = y if bias is None else f"{y}.product"
        nodes.append(helper.make_node("MatMul", [x.name, f"{y}.w"], [product], n.name))
        if bias is not None:
            nodes.append(helper.make_node("Add", [product, *self.reads([bias], constants)], [y], f"{n.name}.bias"))
        return nodes


def _tensor(data: Array, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(data).reshape(np.shape(data)), name)


def _info(name: str, t: TensorType) -> onnx.ValueInfoProto:
    shape: list[int | str] = [int(s.attr) if s.op == "const" else s.attr[0] if s.op == "var" else repr(s) for s in t.shape]
    return helper.make_tensor_value_info(name, _CODE[t.dtype], shape)
