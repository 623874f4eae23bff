"""CUDA C++, or its emulation."""

from luthier.codegen.targets.backend import Backend

BACKEND = Backend(
    "cuda", parse="luthier.codegen.targets.cuda:parse", known="luthier.codegen.targets.cuda:KNOWN",
    builder="luthier.backends.cuda:build_module", loader="luthier.backends.cuda_module:load_module",
)  # fmt: skip
