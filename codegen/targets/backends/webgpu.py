"""WGSL, run by a browser or by wgpu."""

from luthier.codegen.targets.backend import Backend

BACKEND = Backend(
    "webgpu", parse="luthier.codegen.targets.webgpu:parse", known="luthier.codegen.targets.webgpu:KNOWN",
    builder="luthier.backends.webgpu:build_module", loader="luthier.backends.webgpu_module:load_module",
)  # fmt: skip
