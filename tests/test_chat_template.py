"""Chat templates: what transformers renders, and what hostile templates cannot do."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.chat_template import render
from pi2.errors import FormatError

SMOLLM2 = (  # as in the model's own files
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Functions:\\n" }}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages if message.content %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}
"""
QWEN = """{%- macro turn(role, content) -%}
{{ '<|im_start|>' ~ role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
{%- endmacro -%}
{%- set ns = namespace(last=-1, many=false) %}
{%- for message in messages[::-1] %}
    {%- if ns.last < 0 and message.role == "user" and message.content is string %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- continue %}
    {%- endif %}
    {% generation %}{{ turn(message.role, content) }}{% endgeneration %}
{%- endfor %}
{%- set parts = ['a', ns.last, {'k': "<é>"}] %}
{{- parts | tojson }}{{ parts }}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
TEMPLATES = {"smollm2": SMOLLM2, "llama3": LLAMA3, "gemma": GEMMA, "qwen": QWEN}
USER = {"role": "user", "content": "What is <b>2 & 2</b>?\n  é 🙂 "}
ANSWER = {"role": "assistant", "content": "<think>hm</think>\n\nFour."}
SYSTEM = {"role": "system", "content": " Be brief. "}
TALKS = [[USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER], [USER, ANSWER]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<bos>", eos_token="<eos>"
    )
    for talk in TALKS:
        for extra in ({}, {"enable_thinking": False}, {"tools": [{"name": "f", "x": {"<": "é"}}]}):
            for prompt in (True, False):
                expected = theirs.apply_chat_template(
                    talk,
                    chat_template=TEMPLATES[name],
                    tokenize=False,
                    add_generation_prompt=prompt,
                    date_string="today",
                    **extra,
                )
                given = {"bos_token": "<bos>", "eos_token": "<eos>", "date_string": "today"}
                ours = render(TEMPLATES[name], talk, add_generation_prompt=prompt, **given, **extra)
                assert ours == expected


def test_the_smollm2_template_word_for_word():
    assert render(SMOLLM2, [{"role": "system", "content": "Hi"}, {"role": "user", "content": "2+2?"}]) == (
        "<|im_start|>system\nHi<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_missing_bos_token_reads_as_nothing():
    assert render("[{{ bos_token }}]", []) == "[]"


def test_a_template_may_refuse_a_conversation():
    with pytest.raises(FormatError, match="refuses this conversation: Conversation roles must alternate"):
        render(GEMMA, [ANSWER], bos_token="<bos>")


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ 1/0 }}",
        "{{ messages.nothing.more }}",
        "{{ messages.append(1) }}",
        "{% include 'other' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ undefined_function() }}",
        "{{ 'x' | unheard }}",
        "{{ tools | tojson(default=1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{{ '%s' % 1 }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ (1).to_bytes(9999999999, 'big') }}",
        "{{ 'a' | indent(9999999999) }}",
        "{{ [[1]] | tojson(indent=9999999999) }}",
        "{{ ','.join(messages | map('upper')) }}",
        "x" * (1 << 21),
    ],
)
def test_a_template_that_fails_is_one_clear_error(template):
    with pytest.raises(FormatError, match="chat template"):
        render(template, [USER])


NEST = "{%% set ns = namespace(x='ab') %%}{%% for i in range(99) %%}{%% set ns.x = %s %%}{%% endfor %%}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999999) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% for i in range(99999) %}" + "a" * 1000 + "{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% for i in [1] recursive %}{{ loop([1, 2]) if loop.depth < 90 }}{% endfor %}",
        "{{ 'a' * 9999999999 }}",
        "{{ 9999999999 * [1] }}",
        "{{ 10 ** 9999999999 }}",
        "{{ 'a'.ljust(9999999999) }}",
        "{{ ('\t' * 99999).expandtabs(99999) }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999).join('b' * 99999) }}",
        "{{ ('b' * 99999) | join('a' * 99999) }}",
        "{{ ('{0}' * 9999).format('a' * 99999) }}",
        NEST % "ns.x + ns.x",
        NEST % "ns.x ~ ns.x",
        NEST % "[ns.x, ns.x]" + "{{ ns.x }}",
        NEST % "(ns.x, ns.x)" + "{{ ns.x | tojson }}",
        NEST % "{1: ns.x, 2: ns.x}" + "{{ ns.x }}",
        NEST % "dict(a=ns.x, b=ns.x)" + "{{ ns.x }}",
        NEST % "ns.x | replace('a', 'aa')",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set t %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = t %}{% endfor %}",
    ],
)
def test_a_template_cannot_run_for_ever_or_fill_the_memory(template):
    with pytest.raises(FormatError, match=r"too much time or memory|OverflowError"):
        render(template, [USER])


def test_namespaces_within_namespaces_print_short():
    template = (
        "{% set o = namespace(n=namespace()) %}{% for i in range(60) %}"
        "{% set m = namespace(a=o.n, b=o.n) %}{% set o.n = m %}{% endfor %}{{ o.n }}"
    )
    assert render(template, []) == "<namespace>"


def test_a_long_conversation_is_not_too_much():
    talk = [USER | {"content": "word " * 2000}, ANSWER] * 300  # 3 MB
    assert len(render(QWEN, talk)) > 3_000_000


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=30))
def test_what_the_user_says_is_never_read_as_a_template(text):
    talk = [{"role": "user", "content": "{{ 1 + 1 }}{% if %}" + text}]
    assert "{{ 1 + 1 }}{% if %}" + text + "<|im_end|>" in render(SMOLLM2, talk)


def test_a_template_may_ask_for_the_date():
    assert render("{{ strftime_now('%Y') }}", []) in {time.strftime("%Y"), str(int(time.strftime("%Y")) - 1)}
