"""Language models: a GGUF file or an ONNX decoder in, texts out."""

from luthier.llm.model import LanguageModel, Sampling, compile_gguf, compile_model, load

__all__ = ["LanguageModel", "Sampling", "compile_gguf", "compile_model", "load"]
