"""The messages of a chat as the text of a prompt: through the model's template, with the tools that may be called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nibble.service.gateway.chat_template import RESERVED_VARIABLES, ChatTemplate, ChatTemplateError
from nibble.service.gateway.errors import InvalidRequest, shown
from nibble.service.gateway.schema.chat import ChatCompletionRequest, Message, ToolCall
from nibble.service.gateway.served_model import ServedModel
from nibble.service.gateway.tool_choice import ToolUse
from nibble.service.gateway.tool_prompt import without_tool_roles

_NO_REASONING = {"enable_thinking": False, "thinking": False}  # names of one thing in templates of different models

_SEEN_AS = {"reasoning_content": "reasoning_content", "reasoning": "reasoning_content"}  # by templates


class ChatPrompt:
    """The messages of one request, checked. Raises InvalidRequest."""

    def __init__(self, request: ChatCompletionRequest, model: ServedModel, use: ToolUse | None) -> None:
        has_tools = use is not None or any(message.role == "tool" or message.tool_calls for message in request.messages)
        template = model.template(has_tools)
        if template is None:
            raise InvalidRequest(f"the model {model.name} has no chat template", code="no_chat_template")
        self._template = template
        self._request = request
        self._declarations = [tool.declaration for tool in use.tools] if use is not None else []
        self._variables = _variables(request)
        names = {call.id: call.function.name for message in request.messages for call in message.tool_calls or ()}
        self._messages: Sequence[Mapping[str, Any]] = [
            _template_message(message, f"messages[{i}]", template, names) for i, message in enumerate(request.messages)
        ]
        if has_tools and not template.mentions("tools"):
            self._messages = without_tool_roles(self._messages, self._declarations)
            self._declarations = []
        self.num_chars = sum(_num_chars(message) for message in request.messages)
        self.num_chars += sum(len(json.dumps(declaration)) for declaration in self._declarations)

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Those that this template makes nothing of."""
        effort, mentions = self._request.reasoning_effort, self._template.mentions
        names = ["reasoning_effort", *(_NO_REASONING if effort == "none" else ())]
        is_ignored = effort is not None and not any(mentions(name) for name in names)
        given = self._request.chat_template_kwargs or {}
        variables = [name for name, value in given.items() if value is not None and not mentions(name)]
        of_messages = {name: None for message in self._request.messages for name in _set_fields(message)}
        return (
            *(["reasoning_effort"] if is_ignored else []),
            *(f"chat_template_kwargs.{name}" for name in variables),
            *(f"messages.{name}" for name in of_messages if not mentions(_SEEN_AS.get(name, name))),
        )

    @property
    def continued(self) -> str:
        """What the answer begins with, as the request has it."""
        content = self._messages[-1]["content"] if self._request.continue_final_message else ""
        return str(content)

    def render(self) -> str:
        """Raises InvalidRequest."""
        try:
            try:
                return self._render(self._messages)
            except ChatTemplateError:
                as_text = _with_arguments_as_text(self._messages)
                if as_text == self._messages:
                    raise
                return self._render(as_text)
        except ChatTemplateError as error:
            raise InvalidRequest(str(error), param="messages", code="chat_template_error") from error

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        is_continuing = bool(self._request.continue_final_message)
        return self._template.render(
            messages,
            tools=self._declarations or None,
            add_generation_prompt=not is_continuing and self._request.add_generation_prompt is not False,
            continue_final_message=is_continuing,
            variables=self._variables,
        )


def _variables(request: ChatCompletionRequest) -> dict[str, Any]:
    given = request.chat_template_kwargs or {}
    if reserved := RESERVED_VARIABLES & given.keys():
        name = f"chat_template_kwargs.{min(reserved)}"
        raise InvalidRequest(f"{name}: this variable is set by the request itself", param=name)
    if request.continue_final_message and request.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt cannot both be true"
        raise InvalidRequest(message, param="continue_final_message")
    effort = request.reasoning_effort
    own: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    return {**own, **(_NO_REASONING if effort == "none" else {}), **given}


def _set_fields(message: Message) -> list[str]:
    """Of a message, those that a template may do without."""
    values = {name: getattr(message, name) for name in ("name", *_SEEN_AS)} | (message.model_extra or {})
    return [name for name, value in values.items() if value]


def _num_chars(message: Message) -> int:
    content = message.content or ()
    texts = [content] if isinstance(content, str) else [text for part in content for text in (part.text, part.refusal)]
    arguments = [call.function.arguments for call in message.tool_calls or ()]
    return sum(len(text) for text in [*texts, *arguments, message.refusal, message.reasoning_content] if text)


def _template_message(message: Message, path: str, template: ChatTemplate, names: Mapping[str, str]) -> dict[str, Any]:
    """The message as templates expect it: text content, tool arguments as objects, a role that the template knows, the
    name of the function beside its result. names: of the functions that were called, by the id of the call."""
    for field in ("audio", "function_call"):
        if getattr(message, field) is not None:
            raise InvalidRequest(f"{path}.{field} is not supported yet", param=f"{path}.{field}")
    values = message.model_dump(exclude_none=True)
    values["content"] = _text_content(message, path)
    if message.role == "developer" and not template.mentions("developer"):
        values["role"] = "system"
    if message.reasoning is not None:
        values.setdefault("reasoning_content", message.reasoning)
    if message.role == "tool" and message.name is None and (name := names.get(message.tool_call_id or "")):
        values["name"] = name
    if message.tool_calls:
        values["tool_calls"] = [_template_tool_call(call) for call in message.tool_calls]
    else:
        values.pop("tool_calls", None)  # some templates ask only whether it is there
    return values


def _text_content(message: Message, path: str) -> str:
    """Text parts are joined with a line break, as other servers do for templates that take text alone."""
    if message.content is None:
        if message.role == "assistant" and (message.tool_calls or message.refusal):
            return message.refusal or ""
        raise InvalidRequest(f"{path}.content: field required for role {message.role}", param=f"{path}.content")
    if isinstance(message.content, str):
        return message.content
    texts = []
    for i, part in enumerate(message.content):
        where = f"{path}.content[{i}]"
        is_refusal = part.type == "refusal" and message.role == "assistant"
        if part.type != "text" and not is_refusal:
            raise InvalidRequest(f"{where}: content of type {shown(part.type)} is not supported yet", param=where)
        text = part.refusal if is_refusal else part.text
        if text is None:
            raise InvalidRequest(f"{where}.{part.type}: field required", param=f"{where}.{part.type}")
        texts.append(text)
    return "\n".join(texts)


def _template_tool_call(call: ToolCall) -> dict[str, Any]:
    """Arguments that are no JSON stay text: a model wrote them, and is to see what became of them."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}


def _with_arguments_as_text(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Some templates join arguments to other text, and so refuse objects."""
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
