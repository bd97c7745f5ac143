"""Chat templates in the manner of four families of models, as far as tools and reasoning are concerned."""

from __future__ import annotations

QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
    {{- 'answer with <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content is string %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {%- if call.function.arguments is string %}{{- call.function.arguments }}
        {%- else %}{{- call.function.arguments | tojson }}{%- endif %}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
# Asks for the name beside a result.
HERMES = """
{%- for tool in tools or [] %}{{- tool.function.description + ':' + tool.function.parameters.properties | tojson }}
{%- endfor %}
{{- ' <tool_call> ' }}
{%- for message in messages %}
    {%- if message.role == 'tool' and message.name is not defined %}{{ raise_exception('no name') }}{%- endif %}
    {{- message.role + ' ' + (message.name or '') + ' ' + message.content }}
    {%- for call in message.tool_calls %}{{- call.function.arguments | tojson }}{%- endfor %}
{%- endfor %}
"""
LLAMA3 = """
{%- if tools is not none %}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. ' }}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
    {%- else %}
        {{- message.role + ': ' + message.content }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL = """
{%- if tools %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{ raise_exception('ids should have a length of 9') }}{%- endif %}
            {{- call.function | tojson }}
        {%- endfor %}
        {{- ']' }}
    {%- else %}
        {{- message.role + message.content }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_NAMED = MISTRAL + "{# [TOOL_CALLS]name[ARGS]{...} #}"
# Joins arguments to other text, and opens the reasoning in the prompt.
DEEPSEEK = """
{%- for message in messages %}
    {{- message.content.split('</think>')[-1] }}
    {%- for call in message.tool_calls %}{{- 'json\\n' + call.function.arguments }}{%- endfor %}
{%- endfor %}
{%- if tools %}{{- 'tools' }}{%- endif %}
{{- 'Assistant<think>\\n' }}
"""
