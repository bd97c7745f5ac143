"""From the messages of a chat to its prompt."""

from __future__ import annotations

import dataclasses

from chat_plans import MESSAGES, plan, prompt, refusal
from tokenizers import Tokenizer

from nibble.service.gateway.chat_template import ChatTemplate
from nibble.service.gateway.served_model import ServedModel


def test_prompt_is_the_rendered_template(served_model: ServedModel, byte_level: Tokenizer) -> None:
    ids = plan(served_model).requests[0].prompt_token_ids
    text = "<|im_start|>user\nThe quick brown fox<|im_end|>\n<|im_start|>assistant\n"
    assert byte_level.decode(ids, skip_special_tokens=False) == text
    assert ids[0] == byte_level.token_to_id("<|im_start|>"), "the template's markers are single tokens"


def test_text_parts_are_joined(served_model: ServedModel) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "user\none\ntwo<" in prompt(served_model, messages=[{"role": "user", "content": parts}])


def test_developer_is_system_for_a_template_that_does_not_know_it(served_model: ServedModel) -> None:
    messages = [{"role": "developer", "content": "be brief"}, *MESSAGES]
    assert prompt(served_model, messages=messages).startswith("<|im_start|>system\nbe brief")
    template = ChatTemplate("{{ messages[0].role }}{# developer #}", {})
    knowing = dataclasses.replace(served_model, chat_template=template)
    assert prompt(knowing, messages=messages) == "developer"


def test_tool_arguments_reach_the_template_as_objects(served_model: ServedModel) -> None:
    source = "{# tools #}{{ messages[0].tool_calls[0].function.arguments.city }}|{{ messages[1].content }}"
    template = ChatTemplate(source, {})
    model = dataclasses.replace(served_model, chat_template=template)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    assert prompt(model, messages=messages) == "Rome|sunny"
    call["function"] = {"name": "f", "arguments": "{city"}
    assert prompt(model, messages=messages) == "|sunny"


def test_arguments_that_are_no_json_reach_the_template_as_text(served_model: ServedModel) -> None:
    """Without a grammar a model can write such, and the conversation goes on."""
    calls = [
        {"id": str(i), "type": "function", "function": {"name": "f", "arguments": text}}
        for i, text in enumerate(("{city", ""))
    ]
    messages = [
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "0", "content": "these are no arguments"},
    ]
    for source in (
        "{# tools #}{% for call in messages[0].tool_calls %}{{ call.function.arguments | tojson }};{% endfor %}",
        "{# tools #}{% for call in messages[0].tool_calls %}{{ '' + call.function.arguments }};{% endfor %}",
    ):
        text = prompt(dataclasses.replace(served_model, chat_template=ChatTemplate(source, {})), messages=messages)
        assert "{city" in text
        assert text.endswith("{};")
    assert "{city" in prompt(served_model, messages=messages)


def test_generation_prompt_and_continuation(served_model: ServedModel) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "It jumps"}]
    assert prompt(served_model, add_generation_prompt=False).endswith("fox<|im_end|>\n")
    assert prompt(served_model, messages=messages, continue_final_message=True).endswith("assistant\nIt jumps")
    error = refusal(served_model, messages=messages, continue_final_message=True, add_generation_prompt=True)
    assert error.param == "continue_final_message"


def test_template_variables_are_passed_on(served_model: ServedModel) -> None:
    model = dataclasses.replace(served_model, chat_template=ChatTemplate("{{ enable_thinking }}", {}))
    assert prompt(model, chat_template_kwargs={"enable_thinking": False}) == "False"
    error = refusal(model, chat_template_kwargs={"messages": []})
    assert error.param == "chat_template_kwargs.messages"


def test_refusals_are_what_the_assistant_said(served_model: ServedModel) -> None:
    for said in (
        {"content": None, "refusal": "I won't."},
        {"content": [{"type": "refusal", "refusal": "I won't."}]},
        {"content": [{"type": "text", "text": "I"}, {"type": "refusal", "refusal": "won't."}]},
    ):
        messages = [*MESSAGES, {"role": "assistant", **said}, {"role": "user", "content": "Why?"}]
        text = prompt(served_model, messages=messages)
        assert "assistant\nI won't.<|im_end|>" in text.replace("I\nwon't", "I won't")
    part = [{"type": "refusal", "refusal": "no"}]
    assert refusal(served_model, messages=[{"role": "user", "content": part}]).param == "messages[0].content[0]"
    part = [{"type": "refusal"}]
    error = refusal(served_model, messages=[*MESSAGES, {"role": "assistant", "content": part}])
    assert error.param == f"messages[{len(MESSAGES)}].content[0].refusal"


def test_model_without_template(served_model: ServedModel) -> None:
    assert refusal(dataclasses.replace(served_model, chat_template=None)).code == "no_chat_template"


def test_template_that_refuses_is_a_bad_request(served_model: ServedModel) -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    error = refusal(dataclasses.replace(served_model, chat_template=template))
    assert (error.status, error.param) == (400, "messages")
    assert "roles must alternate" in error.message
