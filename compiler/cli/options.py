"""Types of command-line options."""

from __future__ import annotations

from typing import Any

import click


class ShapeParam(click.ParamType[dict[str, tuple[int | str, ...]]]):
    """``name=1x128``; an ``x``-separated list of extents, a word for one that stays symbolic, nothing for a scalar."""

    name = "name=1x128"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).rpartition("=")
        if not equals or not name:
            self.fail(f"{value!r} is not of the form name=1x128", param, ctx)
        extents: list[int | str] = []
        for part in text.split("x") if text else []:
            if part.isdecimal():
                extents.append(int(part))
            elif part.isidentifier():
                extents.append(part)
            else:
                self.fail(f"{part!r} in {value!r} is neither an extent nor a name", param, ctx)
        return name, tuple(extents)
