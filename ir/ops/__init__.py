"""Operator families, one a file; importing :mod:`luthier.ir.op` and calling ``load_all`` registers them."""
