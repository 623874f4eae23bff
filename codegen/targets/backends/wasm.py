"""WebAssembly."""

from luthier.codegen.targets.backend import Backend

BACKEND = Backend(
    "wasm", parse="luthier.codegen.targets.wasm:parse", known="luthier.codegen.targets.wasm:KNOWN",
    builder="luthier.backends.wasm:build_module", loader="luthier.backends.wasm_module:load_module", retiles=True,
)  # fmt: skip
