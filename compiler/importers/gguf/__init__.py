"""GGUF files: contents, metadata, blocks of quantized weights."""

from luthier.importers.gguf.file import GGUF, read_gguf

__all__ = ["GGUF", "read_gguf"]
