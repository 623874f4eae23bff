"""The command line: ``luthier`` and ``compile``."""

from luthier.cli.commands import compile_main, main

__all__ = ["compile_main", "main"]
