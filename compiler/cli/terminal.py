"""What goes to a terminal: names come from files that others made, and may hold escape sequences, bells or marks that turn the line around."""

from __future__ import annotations

import sys
import unicodedata
from typing import TYPE_CHECKING, Any

import click

from luthier import settings

if TYPE_CHECKING:
    import rich.console

__all__ = ["console", "echo", "printable"]

_RAW = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, formats (direction, joiners), surrogates, separators of lines


def printable(text: str, kept: str = "") -> str:
    """``text`` with every character that a terminal would act on as an escape (``\\\\x1b``), those of ``kept`` excepted."""
    if text.isprintable():  # quick; true for most
        return text
    return "".join(c if c in kept or unicodedata.category(c) not in _RAW else c.encode("unicode_escape").decode() for c in text)


def echo(text: object = "", err: bool = False) -> None:
    """A line or several."""
    click.echo(printable(str(text), "\n\t"), err=err)


def console(stderr: bool = False) -> rich.console.Console:
    """A console for tables whose cells are taken literally."""
    from rich.console import Console
    from rich.text import Text

    class Literal(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text, "\n"), **options)

    width = None if sys.stdout.isatty() else 200
    return Literal(stderr=stderr, no_color=settings.color.is_set() or None, highlight=False, markup=False, emoji=False, width=width)
