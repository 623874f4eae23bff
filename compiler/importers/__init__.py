"""Importers: model files to :class:`luthier.ir.graph.Graph`, one format a file."""
