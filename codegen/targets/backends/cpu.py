"""Machine code by LLVM."""

from luthier.codegen.targets.backend import Backend

BACKEND = Backend(
    "cpu", parse="luthier.codegen.targets.cpu:parse", known="luthier.codegen.targets.cpu:KNOWN",
    builder="luthier.backends.cpu:build_module", loader="luthier.module:load_module",
    ahead="luthier.backends.cpu:Ahead",
    measures=True, measures_ceilings=True, checks_bounds=True, keeps_any_state=True,
)  # fmt: skip
