"""Which functions a request lets the model call, and whether it must."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nibble.service.gateway.errors import InvalidRequest, shown
from nibble.service.gateway.schema.chat import ChatCompletionRequest, FunctionName, Tool, ToolChoice


@dataclass(frozen=True)
class OfferedTool:
    """field: where the request has it. schema: of its arguments, always one of an object."""

    field: str
    name: str
    schema: Mapping[str, Any]
    is_strict: bool
    declaration: Mapping[str, Any]  # for the prompt


@dataclass(frozen=True)
class ToolUse:
    """tools: those that may be called; the model is shown no other. is_required: the answer is calls and nothing else.
    is_single: one call at most, always."""

    tools: tuple[OfferedTool, ...]
    is_required: bool
    is_single: bool

    @property
    def is_enforced(self) -> bool:
        """Whether a grammar is needed, since what a model writes by itself may be something else."""
        return self.is_required or self.is_single or any(tool.is_strict for tool in self.tools)


def tool_use(request: ChatCompletionRequest) -> ToolUse | None:
    """None: there is nothing to be called. Raises InvalidRequest."""
    choice = request.tool_choice
    tools = _offered(request.tools or ())
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice: there are no tools to choose from", param="tool_choice")
        return None
    is_single = request.parallel_tool_calls is False
    if choice == "none":
        return None
    if isinstance(choice, ToolChoice):
        return _chosen(choice, tools, is_single)
    return ToolUse(tuple(tools.values()), choice == "required", is_single)


def _offered(tools: list[Tool] | tuple[()]) -> dict[str, OfferedTool]:
    offered: dict[str, OfferedTool] = {}
    for i, tool in enumerate(tools):
        function, field = tool.function, f"tools[{i}].function"
        if function.name in offered:
            raise InvalidRequest(f"{field}.name: {shown(function.name)} is there twice", param=f"{field}.name")
        schema = {"type": "object", **(function.parameters or {"properties": {}})}
        if schema["type"] != "object":
            message = f"{field}.parameters.type: should be 'object' (got {shown(schema['type'])})"
            raise InvalidRequest(message, param=f"{field}.parameters")
        offered[function.name] = OfferedTool(
            field=field,
            name=function.name,
            schema=schema,
            is_strict=bool(function.strict),
            declaration=_declaration(tool),
        )
    return offered


def _declaration(tool: Tool) -> dict[str, Any]:
    """Some templates take it for granted that all of it is there."""
    function = tool.function.model_dump(exclude_none=True, exclude={"name", "strict"})
    defaults = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": {"name": tool.function.name, **defaults, **function}}


def _chosen(choice: ToolChoice, tools: Mapping[str, OfferedTool], is_single: bool) -> ToolUse:
    if choice.type == "function":
        if choice.function is None:
            raise InvalidRequest("tool_choice.function: field required", param="tool_choice.function")
        return ToolUse((_named(choice.function, tools, "tool_choice.function"),), is_required=True, is_single=True)
    field = "tool_choice.allowed_tools"
    allowed = choice.allowed_tools
    if allowed is None:
        raise InvalidRequest(f"{field}: field required", param=field)
    names = {_named(tool.function, tools, f"{field}.tools[{i}].function").name for i, tool in enumerate(allowed.tools)}
    some = tuple(tool for tool in tools.values() if tool.name in names)
    return ToolUse(some, allowed.mode == "required", is_single)


def _named(function: FunctionName, tools: Mapping[str, OfferedTool], field: str) -> OfferedTool:
    tool = tools.get(function.name)
    if tool is None:
        raise InvalidRequest(f"{field}.name: no tool is called {shown(function.name)}", param=f"{field}.name")
    return tool
