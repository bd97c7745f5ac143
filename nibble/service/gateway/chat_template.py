"""Chat messages to the text of a prompt, through the model's own Jinja template.

Renders as `transformers` does (utils/chat_template_utils.py, `render_jinja_template`): a sandbox, trimmed blocks,
loop controls, `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and the `{% generation %}` tag,
which renders its body. Values are plain JSON data, as they come out of the request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
RESERVED_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})

# What a template can raise on input that it was not written for: its own raise_exception, undefined names, and what
# Python operators raise on values of another type. Anything else is our bug.
_TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatTemplateError(ValueError):
    """The template refuses these messages; the message says why."""


class ChatTemplate:
    """One compiled template. `special_tokens`: bos_token, eos_token ... as text, which templates write themselves."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._template = _environment().from_string(source)

    def mentions(self, word: str) -> bool:
        """Whether the template's source contains the word, as a hint that it handles it."""
        return word in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Raises ChatTemplateError. With continue_final_message the text ends where the last message's content ends."""
        chat = [dict(message) for message in messages]
        final = chat[-1].get("content")
        if continue_final_message:
            if not isinstance(final, str):
                raise ChatTemplateError("continue_final_message: the last message has no text content")
            chat[-1]["content"] = final + _CONTINUE_TAG
        values = {
            **self._special_tokens,
            **(variables or {}),
            "messages": chat,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(values)
        except _TEMPLATE_FAULTS as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error
        return _cut_at_tag(text, str(final)) if continue_final_message else text


def _cut_at_tag(text: str, final: str) -> str:
    tag = _CONTINUE_TAG.strip()
    if tag not in text or final.strip() not in text:
        raise ChatTemplateError("continue_final_message: the chat template changes the last message")
    end = text.rindex(tag)
    is_trimmed = not text.startswith(_CONTINUE_TAG, end)  # the template stripped the message, and so must we
    return text[:end].rstrip() if is_trimmed else text[:end]


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant wrote, for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012 - the declaration of the base class

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Refuses underscore names, which the sandbox would otherwise let a template store."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja2's: namespace(self=...) works
        self, rest = args[0], args[1:]
        for name in (values := dict(*rest, **kwargs)):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"chat templates cannot store {name!r} in a namespace")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment
