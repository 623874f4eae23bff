"""Torch programs to :class:`luthier.ir.graph.Graph`: ATen operators as they stand, one file a family of rules. torch is imported only here."""
