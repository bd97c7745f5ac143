"""Tools for chat templates that know none: declared in the system message, calls and results as plain messages.

The style is the generic one: a call is one JSON object on a line of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


def without_tool_roles(messages: Sequence[Message], declarations: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The same conversation in messages of system, user and assistant, with text alone."""
    plain = _plain(messages)
    if not declarations:
        return plain
    section = _section(declarations)
    if plain[0]["role"] == "system":
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{section}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": section}, *plain]


def _section(declarations: Iterable[Mapping[str, Any]]) -> str:
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in declarations)
    return (
        f"You can call these functions:\n{functions}\n\nTo call one, answer with nothing but a line of JSON: "
        '{"name": <its name>, "arguments": <an object>}. To call several, write a line for each.'
    )


def _plain(messages: Iterable[Message]) -> list[Message]:
    """Results that follow each other are one message: many templates want roles to alternate."""
    plain: list[Message] = []
    is_result = False
    for message in messages:
        if message["role"] == "tool":
            result = f"Result of {message.get('name', 'the function')}: {message['content']}"
            if is_result:
                plain[-1] = {"role": "user", "content": f"{plain[-1]['content']}\n{result}"}
            else:
                plain.append({"role": "user", "content": result})
            is_result = True
            continue
        is_result = False
        calls = [call["function"] for call in message.get("tool_calls", ())]
        lines = [message["content"], *(json.dumps(call, ensure_ascii=False) for call in calls)]
        plain.append({"role": message["role"], "content": "\n".join(filter(None, lines)) if calls else lines[0]})
    return plain
