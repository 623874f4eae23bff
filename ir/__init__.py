"""The IRs: expressions, Compute, loop IR, graph, operators. Nothing here knows a target."""

if __name__ != "luthier.ir":
    raise ImportError("import luthier.ir; the folder 'ir' is not a package of its own")

import luthier.ir.printer  # noqa: F401  gives expressions and loop IR their text
