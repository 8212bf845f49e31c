"""Chats become prompt and response where decode starts, under templates built as the well-known families build theirs.

Each template is a small copy of its family's structure in our own words: who folds the system prompt where, where tools
are, what becomes of thinking, and what follows a turn's end. The tokenizer knows every byte, so a row's tokens read
back as the exact text that the template rendered.
"""

import json

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pop_lightning.core.errors import InputError
from pop_lightning.data.module import CalibrationData

TEMPLATES = {
    # The system turn is always there and holds the date; tools go before the first question; a call ends in <|eom_id|>.
    "llama3": """{{- bos_token }}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string | default('26 Jul 2024') + '\\n\\n' }}
{{- system | trim + '<|eot_id|>' }}
{%- if tools %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nFunctions:\\n\\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\\n\\n' }}{%- endfor %}
    {{- turns[0]['content'] | trim + '<|eot_id|>' }}
    {%- set turns = turns[1:] %}
{%- endif %}
{%- for turn in turns %}
    {%- if turn.tool_calls %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n<|python_tag|>' }}
        {{- turn.tool_calls[0].function | tojson + '<|eom_id|>' }}
    {%- elif turn['role'] == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + turn['content'] + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\\n\\n' + turn['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}""",
    # Thinking of turns before the last question is dropped; the last answer always shows a think block.
    "qwen3": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') + '<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(question=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.question = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content | default('', true) %}
        {%- set thoughts = m.reasoning_content | default('', true) %}
        {%- if '</think>' in content and not thoughts %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.question and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {{- ('\\n' if content else '') + '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    # No system role: it is folded into the first question. The turn's end is not the tokenizer's eos.
    "gemma": """{{- bos_token }}
{%- set first = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}
{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}
{%- for turn in turns %}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n' }}
    {{- (first if loop.first else '') + turn['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}""",
    # No generation prompt: [/INST] is what an answer follows. Tools come before the last question only.
    "mistral": """{{- bos_token }}
{%- set questions = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools and m == questions[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- set first = messages[0].role == 'system' and m == questions[0] %}
        {{- '[INST] ' + (messages[0].content + '\\n\\n' if first else '') + m.content + '[/INST]' }}
    {%- elif m.tool_calls %}
        {{- '[TOOL_CALLS] [' + m.tool_calls[0].function | tojson + ']' + eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}""",
    # The mode of thinking is in the system turn; the marks for training include the answer's header.
    "smollm3": """{%- set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}
{%- set empty = '' if mode == '/think' else '<think>\\n\\n</think>\\n' %}
{{- '<|im_start|>system\\nReasoning Mode: ' + mode + '\\n' }}
{{- messages[0].content + '<|im_end|>\\n' if messages[0].role == 'system' else '<|im_end|>\\n' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {% generation %}
        {{- '<|im_start|>assistant\\n' + empty + m.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' + empty }}{%- endif %}""",
    # The whole chat ends in an end of text, after the end of the turn.
    "phi3": """{%- for m in messages %}{{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}""",
    # Every answer is made to think: the generation prompt opens a block that a finished turn does not show.
    "always_thinks": """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.reasoning_content %}{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{%- endif %}
    {{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}""",
}
SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<|eom_id|>", "<|python_tag|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[TOOL_CALLS]",
           "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]  # fmt: skip
EOS = {"qwen3": "<|im_end|>", "smollm3": "<|im_end|>", "always_thinks": "<|im_end|>", "llama3": "<|eot_id|>"}
# What a model's generation config names in addition to its tokenizer's eos.
ENDS = {"llama3": ["<|eom_id|>", "<|eot_id|>"], "gemma": ["<end_of_turn>"], "phi3": ["<|end|>", "<|user|>"]}

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
CALLED = '{"name": "weather", "arguments": {"city": "Bern"}}'
SYSTEM, ASK, TELL = (
    {"role": role, "content": content}
    for role, content in (("system", "Be brief."), ("user", "How warm?"), ("assistant", "12 degrees."))
)
RESULT = {"role": "tool", "content": "12"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def make_tokenizer(family):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token=EOS.get(family, "<eos>"), extra_special_tokens=SPECIAL
    )
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


def read(family, row, source):
    """One chat as ``(prompt, response)`` text: what its tokens read."""
    if row is not None:
        source.write_text(json.dumps(row) + "\n")
    tokenizer = make_tokenizer(family)
    ends = tokenizer.convert_tokens_to_ids(ENDS.get(family, []))
    (found,) = CalibrationData(source, tokenizer, end_tokens=ends, max_response_tokens=1000).read_rows()
    return tuple(
        tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (found.prompt_ids, found.response_ids)
    )


@pytest.fixture
def split(tmp_path):
    return lambda family, messages, **row: read(family, {"messages": messages} | row, tmp_path / "rows.jsonl")


def test_among_named_templates_transformers_picks_the_one_for_tools(tmp_path):
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = {"default": TEMPLATES["qwen3"], "tool_use": TEMPLATES["llama3"]}
    rows = [{"messages": [ASK, TELL]}, {"messages": [ASK, CALLS], "tools": [TOOL]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain, called = CalibrationData(tmp_path / "rows.jsonl", tokenizer).read_rows()
    assert tokenizer.decode(plain.prompt_ids).startswith("<|im_start|>user")
    assert "Functions:" in tokenizer.decode(called.prompt_ids)


# --- the families -----------------------------------------------------------------------------------------------------


def test_llama_with_a_system_prompt(split):
    prompt, response = split("llama3", [SYSTEM, ASK, TELL], chat_template_kwargs={"date_string": "1 May 2026"})
    assert prompt == (
        "<bos><|start_header_id|>system<|end_header_id|>\n\nToday Date: 1 May 2026\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow warm?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert response == "12 degrees.<|eot_id|>"


def test_llama_answers_with_a_call_which_ends_in_its_own_token(split):
    prompt, response = split("llama3", [ASK, CALLS], tools=[TOOL])
    assert '\n\nFunctions:\n\n{"type": "function"' in prompt
    assert prompt.endswith("How warm?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert response == f"<|python_tag|>{CALLED}<|eom_id|>"


def test_llama_answers_from_a_tools_result(split):
    prompt, response = split("llama3", [ASK, CALLS, RESULT, TELL], tools=[TOOL])
    assert prompt.endswith(
        f"<|python_tag|>{CALLED}<|eom_id|><|start_header_id|>ipython<|end_header_id|>\n\n12<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert response == "12 degrees.<|eot_id|>"


@pytest.mark.parametrize(
    ("settings", "opened", "answered"),
    [
        ({}, "", "<think>\n\n</think>\n\n"),
        ({"enable_thinking": True}, "", "<think>\n\n</think>\n\n"),
        ({"enable_thinking": False}, "<think>\n\n</think>\n\n", ""),
    ],
)
def test_qwens_empty_think_block_belongs_to_the_prompt_where_thinking_is_off(split, settings, opened, answered):
    prompt, response = split("qwen3", [SYSTEM, ASK, TELL], chat_template_kwargs=settings)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow warm?<|im_end|>\n<|im_start|>assistant\n"
        + opened
    )
    assert response == answered + "12 degrees.<|im_end|>"


@pytest.mark.parametrize(
    "answer",
    [
        TELL | {"reasoning_content": "It is May."},
        TELL | {"content": "<think>\nIt is May.\n</think>\n\n12 degrees."},
    ],
    ids=["a field of its own", "in the content"],
)
def test_qwens_thinking_is_part_of_the_response_and_is_removed_from_earlier_turns(split, answer):
    prompt, response = split("qwen3", [ASK, answer, ASK, answer])
    turn = "<|im_start|>user\nHow warm?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt == f"{turn}12 degrees.<|im_end|>\n{turn}"
    assert response == "<think>\nIt is May.\n</think>\n\n12 degrees.<|im_end|>"


def test_qwens_thinking_before_a_call_stays_in_the_prompt_of_the_answer(split):
    calls = CALLS | {"reasoning_content": "Ask the tool."}
    prompt, response = split("qwen3", [ASK, calls, RESULT, TELL], tools=[TOOL])
    assert prompt.startswith('<|im_start|>system\n<tools>\n{"type": "function"')
    assert prompt.endswith(
        f"<think>\nAsk the tool.\n</think>\n\n<tool_call>\n{CALLED}\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert response == "<think>\n\n</think>\n\n12 degrees.<|im_end|>"
    assert split("qwen3", [ASK, calls], tools=[TOOL])[1] == (
        f"<think>\nAsk the tool.\n</think>\n\n<tool_call>\n{CALLED}\n</tool_call><|im_end|>"
    )


def test_thinking_that_the_prompt_has_switched_off_shows_both_renderings(split):
    answer = TELL | {"reasoning_content": "It is May."}
    with pytest.raises(InputError, match=r"line 1: .*think>\\n\\n</think>.*think>\\nIt is May.*chat_template_kwargs"):
        split("qwen3", [ASK, answer], chat_template_kwargs={"enable_thinking": False})


def test_gemma_has_no_system_role_and_a_turns_end_that_is_not_the_tokenizers_eos(split):
    prompt, response = split("gemma", [SYSTEM, ASK, TELL])
    assert prompt == "<bos><start_of_turn>user\nBe brief.\n\nHow warm?<end_of_turn>\n<start_of_turn>model\n"
    assert response == "12 degrees.<end_of_turn>"


def test_gemma_refuses_roles_that_do_not_alternate(split):
    with pytest.raises(InputError, match=r"line 1 cannot be rendered .*must alternate"):
        split("gemma", [ASK, ASK, TELL])


def test_mistral_has_no_generation_prompt_and_tools_before_the_last_question(split):
    again = ASK | {"content": "And cold?"}
    prompt, response = split("mistral", [SYSTEM, ASK, TELL, again, TELL], tools=[TOOL])
    tools = json.dumps([TOOL])
    assert prompt == (
        "<bos>[INST] Be brief.\n\nHow warm?[/INST] 12 degrees.<eos>"
        f"[AVAILABLE_TOOLS] {tools}[/AVAILABLE_TOOLS][INST] And cold?[/INST]"
    )
    assert response == " 12 degrees.<eos>"
    assert split("mistral", [ASK, CALLS], tools=[TOOL])[1] == f"[TOOL_CALLS] [{CALLED}]<eos>"
    assert split("mistral", [ASK, CALLS, RESULT, TELL], tools=[TOOL])[0].endswith("[TOOL_RESULTS] 12[/TOOL_RESULTS]")


@pytest.mark.parametrize(
    ("settings", "mode", "opened"),
    [({}, "/think", ""), ({"enable_thinking": False}, "/no_think", "<think>\n\n</think>\n")],
)
def test_smollm_puts_the_answers_header_and_mode_into_the_prompt(split, settings, mode, opened):
    prompt, response = split("smollm3", [SYSTEM, ASK, TELL], chat_template_kwargs=settings)
    assert prompt == (
        f"<|im_start|>system\nReasoning Mode: {mode}\nBe brief.<|im_end|>\n<|im_start|>user\nHow warm?<|im_end|>\n"
        f"<|im_start|>assistant\n{opened}"
    )
    assert response == "12 degrees.<|im_end|>"


def test_phi_continues_after_the_end_of_the_turn_where_decode_has_stopped(split):
    prompt, response = split("phi3", [SYSTEM, ASK, TELL])
    assert prompt == "<|system|>\nBe brief.<|end|>\n<|user|>\nHow warm?<|end|>\n<|assistant|>\n"
    assert response == "12 degrees.<|end|>"


# --- what cannot be split, and rows that are wrong --------------------------------------------------------------------


def test_a_block_that_only_the_generation_prompt_opens_shows_both_renderings_until_the_row_has_thoughts(split):
    with pytest.raises(
        InputError, match=r"line 1: .*assistant\\n<think>\\n'.*assistant\\n12 degrees.*reasoning_content"
    ):
        split("always_thinks", [ASK, TELL])
    prompt, response = split("always_thinks", [ASK, TELL | {"reasoning_content": "It is May."}])
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert response == "It is May.\n</think>\n12 degrees.<|im_end|>"


def test_white_space_that_the_answer_ends_on_is_the_answers(split):
    assert split("qwen3", [ASK, TELL | {"content": "12 degrees. \n"}])[1].endswith("12 degrees. \n<|im_end|>")


def test_tools_and_variables_may_be_json_text_or_tables(split, tmp_path):
    expected = split("qwen3", [ASK, CALLS], tools=[TOOL], chat_template_kwargs={"enable_thinking": False})
    found = split("qwen3", [ASK, CALLS], tools=json.dumps([TOOL]), chat_template_kwargs='{"enable_thinking": false}')
    assert found == expected
    # A table's messages share their keys, so that the question has a tool_calls of null.
    row = {"messages": [ASK, CALLS], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    row["tools"][0]["function"]["parameters"].pop("properties")  # Arrow has no column type without fields
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "table")
    expected = split("qwen3", row["messages"], tools=row["tools"], chat_template_kwargs={"enable_thinking": False})
    assert read("qwen3", None, tmp_path / "table") == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": {"name": "weather"}}, "'tools' of type dict: expected a list of tools"),
        ({"tools": ["weather"]}, "'tools' of type list: expected a list of tools"),
        ({"tools": "weather"}, "'tools' that is not JSON"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' of type list: expected an object"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "sets add_generation_prompt"),
    ],
)
def test_tools_and_variables_of_another_kind_are_refused(split, row, reason):
    with pytest.raises(InputError, match=rf"line 1 .*{reason}"):
        split("qwen3", [ASK, TELL], **row)
