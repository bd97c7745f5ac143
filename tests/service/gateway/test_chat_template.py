"""Chat templates against `transformers`, which is what their authors wrote them for."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nibble.service.gateway.chat_template import ChatTemplate, ChatTemplateError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": " What is 日本? "},
    {"role": "assistant", "content": "A country.\n"},
    {"role": "user", "content": "And 😀?"},
    {"role": "assistant", "content": "A face "},
]
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"city": "Köln <&>"}}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- set prefix = system_message + '\n\n' if loop.first and system_message is defined else '' %}
        {{- '[INST] ' + prefix + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TOOLS = """
{% set ns = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == 'tool' %}
        {% continue %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
<{{ message.role }} {{ ns.count }}>{% generation %}{{ message.content }}{% endgeneration %}

    {% for call in message.tool_calls or [] %}
{{ call.function | tojson }} {{ call.function.arguments | tojson(indent=2) }}
{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}
    {% endfor %}
{% endfor %}
{% if tools is none and documents is none and not enable_thinking %}<think></think>{% endif %}
{{ strftime_now('%Y') }}"""


def reference(template: str, chat: list[dict[str, Any]], **options: Any) -> str:
    rendered, _ = render_jinja_template([chat], chat_template=template, **SPECIAL, **options)
    return rendered[0]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("template", "chat"),
    [(CHATML, CHAT), (LLAMA_2, CHAT[1:]), (LLAMA_2, CHAT), (TOOLS, CHAT), (TOOLS, TOOL_CHAT)],
)
def test_renders_as_transformers_does(template: str, chat: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    ours = ChatTemplate(template, SPECIAL).render(
        chat, add_generation_prompt=add_generation_prompt, variables={"enable_thinking": False}
    )
    assert ours == reference(template, chat, add_generation_prompt=add_generation_prompt, enable_thinking=False)


@pytest.mark.parametrize("template", [CHATML, LLAMA_2])
def test_final_message_is_continued_as_transformers_does(template: str) -> None:
    ours = ChatTemplate(template, SPECIAL).render(CHAT[1:], add_generation_prompt=False, continue_final_message=True)
    assert ours == reference(template, CHAT[1:], continue_final_message=True)
    assert "A face" in ours[-8:], "the text ends where the message ends"


def test_rendering_leaves_the_messages_as_they_were() -> None:
    chat = [{"role": "user", "content": "x"}]
    ChatTemplate(CHATML, {}).render(chat, continue_final_message=True, add_generation_prompt=False)
    assert chat == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate"),
        ("{{ messages[7]['content']['x'] }}", "no element 7"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{% set ns = namespace() %}{% set ns.__x = 1 %}", "cannot store"),
    ],
)
def test_template_that_refuses_says_why(template: str, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=reason):
        ChatTemplate(template, {}).render(CHAT)


def test_continuing_a_message_that_the_template_drops_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="continue_final_message"):
        ChatTemplate("fixed text", {}).render(CHAT, continue_final_message=True, add_generation_prompt=False)
