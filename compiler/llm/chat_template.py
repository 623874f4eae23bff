"""A model's own chat template: Jinja text that turns messages into a prompt, in a sandbox and with the helpers that such templates expect."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.errors import InputError, InvalidModel

__all__ = ["Message", "render_chat"]

Message = Mapping[str, Any]


class _Refused(TemplateError):
    """The template's own ``raise_exception``."""


class _Generation(Extension):
    """``{% generation %} .. {% endgeneration %}``, which marks the assistant's words for training, prints what is inside."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(inside).set_lineno(line)


def _refuse(message: str) -> None:
    raise _Refused(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def render_chat(template: str, messages: Sequence[Message], names: Mapping[str, str] | None = None, add_generation_prompt: bool = True) -> str:
    """The prompt for the answer to ``messages`` (each with ``role`` and ``content``). ``names``: texts of special tokens, such as ``bos_token``.
    Raises InputError for messages that the template refuses, InvalidModel for a template that does not work."""
    for m in messages:
        if not isinstance(m, Mapping) or not isinstance(m.get("role"), str):
            raise InputError(f"a message of a chat has a role and a content, not {m!r}"[:200])
    try:
        made = _environment().from_string(template)
        return made.render(messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **(names or {}))
    except _Refused as e:
        raise InputError(f"the model's chat template refuses these messages: {e}") from None
    except RecursionError:
        raise InvalidModel("the model's chat template is nested too deeply", hint="give the whole prompt instead") from None
    except Exception as e:  # a template may fail in any way that an expression can
        raise InvalidModel(f"the model's chat template does not work: {type(e).__name__}: {e}", hint="give the whole prompt instead") from None
