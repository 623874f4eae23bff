"""TfIdfVectorizer on integers against onnxruntime: modes, weights, skips, open extents."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import luthier
from luthier.errors import ShapeError

POOL, COUNTS, PLACES = [2, 3, 5, 4, 5, 6, 7, 8, 6, 7, 2, 2, 5, 6, 7], [0, 4, 12], [0, 1, 2, 3, 6, 5, 4, 7, 8]  # four of one, four of two, one of three


def model(shape: list[Any], mode: str, kind: int, **attrs: Any) -> onnx.ModelProto:
    given = {"min_gram_length": 1, "max_gram_length": 2, "max_skip_count": 0, "ngram_counts": COUNTS, "ngram_indexes": PLACES, "pool_int64s": POOL}
    node = helper.make_node("TfIdfVectorizer", ["x"], ["y"], name="grams", mode=mode, **{**given, **attrs})
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", kind, shape)], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("mode", ["TF", "IDF", "TFIDF"])
@pytest.mark.parametrize("attrs", [{}, {"max_skip_count": 3}, {"min_gram_length": 2, "max_gram_length": 3, "max_skip_count": 1}], ids=str)
def test_against_onnxruntime(mode: str, attrs: dict[str, Any]) -> None:
    weights = {} if mode == "TF" else {"weights": [0.5 + 0.25 * k for k in range(9)]}
    m = model(["n", "c"], mode, TensorProto.INT32, **attrs, **weights)
    session, module = onnxruntime.InferenceSession(m.SerializeToString()), luthier.compile(m)
    rng = np.random.default_rng(1)
    for shape in ((1, 12), (3, 40), (2, 2)):
        x = rng.integers(2, 9, shape).astype(np.int32)
        np.testing.assert_allclose(module.run({"x": x})["y"], session.run(None, {"x": x})[0], rtol=1e-6)


def test_rank_one_and_refusals() -> None:
    m = model(["c"], "TF", TensorProto.INT64)
    x = np.array([2, 2, 5, 6, 5, 6], np.int64)
    np.testing.assert_array_equal(luthier.compile(m).run({"x": x})["y"], onnxruntime.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0])
    with pytest.raises(ShapeError, match="ngram_counts.*grams"):
        luthier.compile(model(["c"], "TF", TensorProto.INT64, ngram_counts=[0, 3, 12]))
