"""The data path: every row shape, every error with its place, disjoint splits, batches, cached responses."""

import gzip
import importlib.resources
import itertools
import json
import logging
import os
import random

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pop_lightning.core.bundled import resolve_bundled
from pop_lightning.core.errors import InputError
from pop_lightning.data.batches import collate
from pop_lightning.data.examples import read_examples
from pop_lightning.data.module import CalibrationData
from pop_lightning.data.rows import MIN_TEXT_TOKENS, Row, RowTokenizer
from pop_lightning.data.splits import SPLITS, split_rows

WORDS = [f"w{number}" for number in range(200)]
SPECIAL = ["<unk>", "<pad>", "<bos>", "<eos>", "<user>", "<assistant>"]
UNK, PAD, BOS, EOS, USER, ASSISTANT = range(len(SPECIAL))
CHAT = (
    "{{ bos_token }}{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }} <eos>{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def make_tokenizer(template: str = "<bos> $A", chat: str | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = chat
    return tokenizer


def token(word: int) -> int:
    return len(SPECIAL) + word


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pairs(count: int) -> list[dict]:
    return [{"prompt": words(n, n // 2, n % 7), "response": words(n % 11)} for n in range(count)]


def load(path, tokenizer=None, **settings) -> CalibrationData:
    calibration = CalibrationData(path, tokenizer or make_tokenizer(), **settings)
    calibration.setup()
    return calibration


def all_rows(calibration: CalibrationData) -> dict[str, Row]:
    return {row.origin: row for name in SPLITS for row in calibration.rows_of(name)}


@pytest.fixture
def prompts_only(tmp_path):
    return write(tmp_path / "prompts.jsonl", [{"prompt": words(n, n + 1)} for n in range(10)])


# --- row shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["<bos> $A", "$A", "<bos> $A <eos>"])
def test_a_pair_has_the_tokenizers_bos_on_its_prompt_and_eos_on_its_response(tmp_path, template):
    rows = [{"prompt": words(5, 6), "response": words(7), "kind": "extra"}, *pairs(5)]
    row = all_rows(load(write(tmp_path / "a.jsonl", rows), make_tokenizer(template)))["a.jsonl line 1"]
    bos = (BOS,) if template.startswith("<bos>") else ()
    assert row.prompt_ids == (*bos, token(5), token(6))
    assert row.response_ids == (token(7), EOS)


def test_an_eos_in_the_text_itself_stays(tmp_path):
    rows = [{"prompt": "w5 <eos>", "response": "w7 <eos>"}, *pairs(5)]
    row = all_rows(load(write(tmp_path / "a.jsonl", rows)))["a.jsonl line 1"]
    assert row.prompt_ids == (BOS, token(5), EOS)
    assert row.response_ids == (token(7), EOS)


def test_messages_are_split_exactly_where_generation_starts(tmp_path):
    turns = [("user", 1), ("assistant", 2), ("user", 3), ("assistant", 4)]
    rows = [{"messages": [{"role": role, "content": words(n)} for role, n in turns]}, *pairs(5)]
    row = all_rows(load(write(tmp_path / "a.jsonl", rows), make_tokenizer(chat=CHAT)))["a.jsonl line 1"]
    assert row.prompt_ids == (BOS, USER, token(1), EOS, ASSISTANT, token(2), EOS, USER, token(3), EOS, ASSISTANT)
    assert row.response_ids == (token(4), EOS)


def test_messages_whose_token_straddles_the_split_keep_the_prompt_that_generation_sees(tmp_path):
    chat = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}w{% endif %}{{ m['content'] }}"
        "{% if not loop.last %} {% endif %}{% endfor %}{% if add_generation_prompt %} w{% endif %}"
    )
    # Rendered: "w1 w" and "w1 w2 w3"; as tokens "w2" is one, so the prompt's "w" is no prefix of it.
    rows = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "2 w3"}]}, *pairs(5)]
    row = all_rows(load(write(tmp_path / "a.jsonl", rows), make_tokenizer(chat=chat)))["a.jsonl line 1"]
    assert row.prompt_ids == (token(1), UNK)
    assert row.response_ids == (UNK, token(3))


def test_text_is_split_by_its_content_between_half_and_four_fifths(tmp_path):
    texts = [words(*(random.Random(n).choices(range(200), k=40))) for n in range(50)]
    forward = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    backward = write(tmp_path / "b.jsonl", [{"text": text} for text in reversed(texts)])
    rows = list(all_rows(load(forward)).values())
    points = {len(row.prompt_ids) for row in rows}
    assert len(rows) == 50
    assert all(row.length == 41 for row in rows)
    assert points <= set(range(21, 33))
    assert len(points) > 5
    assert {row.seed for row in rows} == {row.seed for row in all_rows(load(backward)).values()}


def test_long_text_is_cut_to_what_prompt_and_response_may_hold(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": words(n, *range(150))} for n in range(8)])
    calibration = load(path, max_prompt_tokens=12, max_response_tokens=6, context=16)
    rows = all_rows(calibration).values()
    assert len(rows) == 8
    assert calibration.report.truncated == 8
    for row in rows:
        assert row.length <= 16
        assert 8 <= len(row.prompt_ids) <= 12
        assert 1 <= len(row.response_ids) <= 6


def test_rows_that_are_cut_name_the_limit_and_the_tokenizer_does_not_warn_of_them(tmp_path, caplog):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 16
    logging.getLogger("transformers").addHandler(caplog.handler)
    texts = write(tmp_path / "a.jsonl", [{"text": words(n, *range(150))} for n in range(8)])
    responses = write(tmp_path / "b.jsonl", [{"prompt": words(n), "response": words(*range(40))} for n in range(8)])
    try:
        assert "8 cut to the model's 16 tokens" in str(load(texts, tokenizer, context=16).report)
        shorter = {"max_prompt_tokens": 9, "max_response_tokens": 6}
        expected = "8 cut to max_prompt_tokens (9) and max_response_tokens (6)"
        assert expected in str(load(texts, tokenizer, context=16, **shorter).report)
        assert "8 cut to max_response_tokens (6)" in str(load(responses, tokenizer, context=16, **shorter).report)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


@settings(max_examples=60, deadline=None)
@given(length=st.integers(7, 199), prompt=st.integers(1, 60), response=st.integers(1, 60), context=st.integers(8, 90))
def test_text_of_any_length_keeps_every_limit(length, prompt, response, context):
    tokenize = RowTokenizer(make_tokenizer(), prompt, response, context)
    row, reason, limit = tokenize({"text": words(*range(length))}, "here")
    if prompt + response < MIN_TEXT_TOKENS:
        assert row is None
        assert "text shorter" in reason
        return
    assert 1 <= len(row.prompt_ids) <= prompt
    assert 1 <= len(row.response_ids) <= response
    assert row.length <= context
    assert (limit is not None) == (row.length < length + 1)
    if limit is not None and "model" in limit:
        assert row.length == context < prompt + response
    elif limit is not None:
        assert len(row.response_ids) == response
        assert ("max_prompt_tokens" in limit) == (min(length + 1, context) >= prompt + response)
    assert row.prompt_ids + row.response_ids == (BOS, *map(token, range(row.length - 1)))


def test_prompts_without_responses_wait_for_them(prompts_only):
    calibration = load(prompts_only)
    assert calibration.missing_responses()
    assert all(row.response_ids is None for row in all_rows(calibration).values())
    assert calibration.report.response_tokens is None
    with pytest.raises(InputError, match=r"prompts\.jsonl line \d+ has no response yet"):
        calibration.loader("fit")


# --- sources ----------------------------------------------------------------------------------------------------------


def test_gzip_blank_lines_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8-sig") as file:
        file.write('{"prompt": "ä", "response": "b"}\n\n{"prompt": "c", "response": null}\n')
    assert read_examples(path) == [
        ({"prompt": "ä", "response": "b"}, "a.jsonl.gz line 1"),
        ({"prompt": "c"}, "a.jsonl.gz line 3"),
    ]


def test_blank_lines_separate_the_documents_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\none\ntwo\n  \n\nthree\n")
    assert read_examples(path) == [({"text": "one\ntwo"}, "a.txt line 3"), ({"text": "three"}, "a.txt line 7")]


def test_a_saved_datasets_folder_is_read_with_and_without_splits(tmp_path):
    table = datasets.Dataset.from_list([{**row, "id": n} for n, row in enumerate(pairs(6))])
    table.save_to_disk(tmp_path / "flat")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "parts")
    assert [example for example, _ in read_examples(tmp_path / "flat")] == [
        row | {"ignored": ["id"]} for row in pairs(6)
    ]
    assert read_examples(tmp_path / "parts", "test") == [(pairs(6)[1] | {"ignored": ["id"]}, "parts row 0")]
    assert len(all_rows(load(tmp_path / "parts"))) == 6
    with pytest.raises(InputError, match=r"no split 'dev'; set data\.split to one of train, test"):
        read_examples(tmp_path / "parts", "dev")


def test_a_folder_of_files_goes_through_load_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", pairs(5))
    assert [example for example, _ in read_examples(tmp_path / "folder")] == pairs(5)


def test_a_datasets_folder_with_other_columns_names_them(tmp_path):
    datasets.Dataset.from_list([{"question": "a", "answer": "b"}]).save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match=r"columns question, answer: expected \{\"prompt\", \"response\"\}"):
        read_examples(tmp_path / "other")


def test_bundled_names_resolve_inside_the_package_only(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "small").mkdir(parents=True)
    write(tmp_path / "checkpoints" / "small" / "rows.jsonl", pairs(5))
    write(tmp_path / "outside.jsonl", pairs(5))
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path / "checkpoints")
    assert resolve_bundled("org/model") == "org/model"
    assert resolve_bundled("bundled:small") == str(tmp_path / "checkpoints" / "small")
    assert len(read_examples("bundled:small/rows.jsonl")) == 5
    for name in ("bundled:", "bundled:large", "bundled:../outside.jsonl"):
        with pytest.raises(InputError, match=r"expected one of bundled:small, bundled:small/rows\.jsonl;"):
            resolve_bundled(name)


# --- errors -----------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "w1", "response": "w2"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', r"line 3 is not JSON"),
        ("[1, 2]", r"line 3 is a JSON list, not an object"),
        ({"question": "a", "answer": "b"}, r"line 3 has the keys 'question', 'answer': expected \{\"prompt\""),
        ({}, r"line 3 has the keys none"),
        ({"response": "a"}, r"line 3 has the keys 'response'"),
        ({"prompt": 7}, r"line 3 has a 'prompt' of type int: expected a string"),
        ({"messages": "hello"}, r"line 3 has \"messages\" that are not a list"),
        (
            {"messages": [{"role": "system", "content": "a"}]},
            r"line 3 has 'system' as the role of its last message: expected 'assistant'",
        ),
        ({"messages": []}, r"line 3 has no message"),
        ('{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", r"line 3 is not JSON \(nested too deep\)"),
        ('{"prompt": "half of a pair: \\ud800"}', r"line 3 holds half of a surrogate pair"),
        ('{"prompt": "a", "x": ' + "9" * 5000 + "}", r"line 3 is not JSON \(a number of more than 4300 digits\)"),
        ({"messages": [{"role": "assistant", "content": 3}]}, r"line 3 has a message whose \"content\" is neither"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
            r"line 3 has an image in its last message",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "audio"}]}]},
            r"line 3 has message parts of type audio",
        ),
        ({"prompt": "a", "images": "a.png"}, r"line 3 has \"images\" of type str: expected a list"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_by_file_line_and_key(tmp_path, line, message):
    path = write(tmp_path / "rows.jsonl", [GOOD, "", line])
    with pytest.raises(InputError, match=r"data\.calibration .*rows\.jsonl' " + message):
        raise read_examples(path)[-1][0]["error"]


def test_single_rows_that_cannot_be_read_are_counted_and_many_are_refused(tmp_path):
    lines = [{"prompt": f"w{n} w{n + 1}", "response": "w2"} for n in range(38)]
    data = load(write(tmp_path / "rows.jsonl", [*lines, "{", {"prompt": 7}]))
    assert len(all_rows(data)) == 38
    assert "2 rows that cannot be read (first: data.calibration" in str(data.report)
    assert "line 39 is not JSON" in str(data.report)
    with pytest.raises(InputError, match="line 39 is not JSON"):
        load(write(tmp_path / "rows.jsonl", [*lines, *["{"] * 5]))


# --- shapes of other libraries --------------------------------------------------------------------------------------


def test_completions_of_trl_are_responses(tmp_path):
    question, answer = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
    path = write(
        tmp_path / "rows.jsonl",
        [{"prompt": "w1", "completion": "w2"}, {"prompt": [question], "completion": [answer]}, {"prompt": [question]}],
    )
    assert [example for example, _ in read_examples(path)] == [
        {"prompt": "w1", "response": "w2"},
        {"messages": [question, answer]},
        {"messages": [question]},
    ]


def test_keys_that_are_not_read_are_named(tmp_path):
    data = load(write(tmp_path / "rows.jsonl", [row | {"answer": "w2", "id": 1} for row in pairs(9)]))
    assert "keys that are not used: answer (9 rows), id (9 rows)" in str(data.report)


def test_keys_that_are_not_read_are_named_after_the_full_model_has_answered(tmp_path):
    rows = [{"prompt": row["prompt"], "answer": "w2"} for row in pairs(9)]
    data = load(write(tmp_path / "rows.jsonl", rows))
    data.fill_responses(lambda batch: [(token(1), EOS) for _ in batch], tmp_path / "responses.json")
    assert "keys that are not used: answer (9 rows)" in str(data.report)


@pytest.mark.parametrize("kind", ["array.json", "table.csv", "table.parquet", "lines.jsonl"])
def test_tables_and_arrays_are_read_with_the_users_own_columns(tmp_path, kind):
    rows = [{"question": f"w{n}", "answer": f"w{n + 1}"} for n in range(4)]
    path = tmp_path / kind
    if kind == "array.json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "lines.jsonl":
        write(path, rows)
    else:
        table = datasets.Dataset.from_list(rows)
        (table.to_csv if kind.endswith("csv") else table.to_parquet)(str(path))
    columns = {"prompt": "question", "response": "answer"}
    assert [example for example, _ in read_examples(path, columns=columns)] == pairs_of(rows)
    with pytest.raises(InputError, match=r"data\.columns .*'reply'"):
        load(path, columns={"prompt": "question", "response": "reply"})


def pairs_of(rows):
    return [{"prompt": row["question"], "response": row["answer"]} for row in rows]


def test_the_configuration_of_a_dataset_is_asked_for_by_name(monkeypatch):
    asked = []
    table = datasets.Dataset.from_list([GOOD])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or table)
    assert read_examples("openai/gsm8k", "test", name="main")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_a_prompt_that_begins_with_the_bos_token_gets_no_second_one(tmp_path):
    rows = [row | {"prompt": f"<bos> {row['prompt']}"} for row in pairs(9)]
    data = load(write(tmp_path / "rows.jsonl", rows))
    assert all(row.prompt_ids.count(BOS) == 1 for row in data.rows())


def test_a_chat_that_ends_with_a_question_is_answered_by_the_full_model(tmp_path):
    chats = [{"messages": [{"role": "user", "content": words(n)}]} for n in range(9)]
    data = load(write(tmp_path / "rows.jsonl", chats), make_tokenizer(chat=CHAT))
    assert data.missing_responses()
    for row in data.rows():
        assert row.response_ids is None
        assert (row.prompt_ids[0], row.prompt_ids[-1]) == (BOS, ASSISTANT)
        assert row.prompt_ids.count(BOS) == 1


@pytest.mark.parametrize("name", ["none.jsonl", "none.txt", "none.jsonl.gz", "no_folder"])
def test_a_missing_file_is_an_input_error(tmp_path, name):
    with pytest.raises(InputError, match=rf"data\.calibration .*{name}' does not exist"):
        read_examples(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows"])
def test_a_pipe_in_place_of_rows_is_refused_instead_of_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=rf"data\.calibration .*{name}' is neither a regular file nor a folder"):
        read_examples(tmp_path / name)


def test_a_chat_that_the_template_refuses_is_counted_and_the_others_are_used(tmp_path):
    template = "{% if 'w99' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + CHAT
    chats = [{"messages": [{"role": "user", "content": f"w{n}"}]} for n in (*range(19), 99)]
    data = load(write(tmp_path / "rows.jsonl", chats), make_tokenizer(chat=template))
    assert len(all_rows(data)) == 19
    assert "1 rows that cannot be read (first: rows.jsonl line 20 cannot be rendered" in str(data.report)


def test_sources_that_cannot_be_read_are_input_errors(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "rows.csv").write_text("prompt\n")
    (tmp_path / "rows.xml").write_text("<prompt>")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}' * 100)[:-12])
    (tmp_path / "hollow").mkdir()
    for name, message in [
        ("empty.jsonl", "holds no rows"),
        ("rows.csv", "nor a dataset that loads"),
        ("rows.xml", r"unknown kind: expected \.jsonl"),
        ("latin.txt", "not UTF-8"),
        ("plain.jsonl.gz", "cannot be read"),
        ("cut.jsonl.gz", "cannot be read"),
        ("hollow", "nor a dataset that loads"),
    ]:
        with pytest.raises(InputError, match=rf"data\.calibration .*{name}.*{message}"):
            read_examples(tmp_path / name)


def test_messages_without_a_chat_template_are_an_input_error(tmp_path):
    chat = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    with pytest.raises(InputError, match=r"rows\.jsonl line 1 .*no chat template.*model\.base"):
        load(write(tmp_path / "rows.jsonl", [chat]))


def test_a_template_whose_prompt_is_not_a_prefix_shows_both_renderings(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    chat = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    with pytest.raises(InputError, match=r"line 1: .*'w1 <think>'.*'w1 w2 '.*data\.calibration"):
        load(write(tmp_path / "rows.jsonl", [chat]), make_tokenizer(chat=template))


def test_a_template_that_refuses_a_row_is_an_input_error(tmp_path):
    chat = {"messages": [{"role": "system", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match=r"line 1 cannot be rendered .*no system role"):
        load(write(tmp_path / "rows.jsonl", [chat]), make_tokenizer(chat=template))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_prompt_tokens": 0}, r"data\.max_prompt_tokens must be .* at least 1, found 0"),
        ({"max_response_tokens": 1.5}, r"data\.max_response_tokens must be"),
        ({"limit": -1}, r"data\.limit must be"),
        ({"batch_size": True}, r"data\.batch_size must be"),
        ({"splits": {"fit": 0.5, "test": 0.5}}, r"data\.splits has fit, test: expected exactly fit, tune"),
        ({"splits": {**SPLITS, "fit": 0.5}}, r"data\.splits must sum to 1, found 1\.2"),
        ({"splits": {**SPLITS, "fit": 0}}, r"data\.splits\.fit must be a fraction between 0 and 1, found 0"),
    ],
)
def test_settings_that_do_not_fit_name_their_key(wrong, message):
    with pytest.raises(InputError, match=message):
        CalibrationData("rows.jsonl", make_tokenizer(), **wrong)


# --- what is left out -------------------------------------------------------------------------------------------------


def test_rows_left_out_are_counted_by_reason_with_the_first_of_each(tmp_path):
    rows = [
        *pairs(5),
        {"prompt": "  ", "response": "w1"},
        {"prompt": "w1", "response": " "},
        {"prompt": words(*range(20)), "response": "w1"},
        {"prompt": words(*range(8)), "response": words(*range(5))},
        {"text": "w1 w2"},
        {"prompt": "", "response": "w1"},
        pairs(5)[2],
        {"prompt": "w50", "response": words(*range(60))},
        {"messages": [{"role": "assistant", "content": "w1"}]},
    ]
    calibration = load(write(tmp_path / "a.jsonl", rows), max_prompt_tokens=10, max_response_tokens=6, context=12)
    report = calibration.report
    assert report.rows == 6
    assert report.unusable == {
        "empty prompt": 3,
        "empty response": 1,
        "prompt longer than max_prompt_tokens": 1,
        "longer than the model's context": 1,
        "text shorter than 8 tokens": 1,
        "duplicate": 1,
    }
    assert report.first_unusable["empty prompt"] == "a.jsonl line 6"
    assert report.first_unusable["duplicate"] == "a.jsonl line 12"
    assert report.truncated == 1
    assert len(all_rows(calibration)["a.jsonl line 13"].response_ids) == 6
    assert report.prompt_tokens == {"min": 2, "median": 4, "max": 4}
    assert json.loads(json.dumps(report.to_dict()))["response_tokens"]["max"] == 6
    assert "\n" not in str(report)
    assert "6 rows" in str(report)
    assert "3 empty prompt (first: a.jsonl line 6)" in str(report)


def test_no_usable_row_is_an_input_error_with_counts_and_the_first_origin(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "", "response": "w1"}, {"prompt": "w1", "response": ""}] * 2)
    with pytest.raises(
        InputError, match=r"2 empty prompt \(first: a\.jsonl line 1\); 2 empty response \(first: a\.jsonl"
    ):
        load(path)


def test_a_prompt_leaves_room_in_the_context_for_the_response_to_come(prompts_only):
    assert load(prompts_only, max_response_tokens=5, context=8).report.rows == 10
    with pytest.raises(InputError, match="10 longer than the model's context"):
        load(prompts_only, max_response_tokens=6, context=8)


def test_limit_draws_by_content_not_from_the_head(tmp_path):
    rows = pairs(60)
    forward = load(write(tmp_path / "a.jsonl", rows), limit=12)
    backward = load(write(tmp_path / "b.jsonl", rows[::-1]), limit=12)
    chosen = {row.seed for row in all_rows(forward).values()}
    assert forward.report.rows == len(chosen) == 12
    assert chosen == {row.seed for row in all_rows(backward).values()}
    assert set(all_rows(forward)) != {f"a.jsonl line {n}" for n in range(1, 13)}


# --- splits -----------------------------------------------------------------------------------------------------------

row_lists = st.lists(
    st.builds(
        lambda prompt, response: Row(tuple(prompt), tuple(response), "here"),
        st.lists(st.integers(0, 9), min_size=1, max_size=3),
        st.lists(st.integers(0, 3), min_size=1, max_size=2),
    ),
    unique_by=lambda row: (row.prompt_ids, row.response_ids),
    min_size=1,
    max_size=40,
)
fractions = st.lists(st.integers(1, 50), min_size=4, max_size=4).map(
    lambda parts: {name: part / sum(parts) for name, part in zip(SPLITS, parts, strict=True)}
)


@settings(max_examples=150, deadline=None)
@given(rows=row_lists, parts=fractions, seed=st.integers(0, 3), shuffled=st.randoms(use_true_random=False))
def test_splits_are_disjoint_by_prompt_whole_and_independent_of_file_order(rows, parts, seed, shuffled):
    if len({row.prompt_ids for row in rows}) < 4:
        with pytest.raises(InputError, match=r"distinct prompts, expected at least 4.*data\.calibration"):
            split_rows(rows, parts, seed)
        return
    splits = split_rows(rows, parts, seed)
    assert sorted(row.seed for part in splits.values() for row in part) == sorted(row.seed for row in rows)
    assert all(splits.values())
    owners = {}
    for name, part in splits.items():
        for row in part:
            assert owners.setdefault(row.prompt_ids, name) == name
    reordered = shuffled.sample(rows, len(rows))
    assert split_rows(reordered, parts, seed) == splits


def test_splits_have_their_fractions_and_follow_the_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(100))
    calibration = load(path, splits=dict(reversed(SPLITS.items())))
    assert {name: len(calibration.rows_of(name)) for name in SPLITS} == {
        "fit": 30,
        "tune": 10,
        "search": 20,
        "verify": 40,
    }
    assert calibration.rows_of("fit") == load(path).rows_of("fit")
    assert calibration.rows_of("fit") != load(path, seed=1).rows_of("fit")
    with pytest.raises(InputError, match=r"no split 'test': expected one of fit, tune, search, verify"):
        calibration.rows_of("test")


def test_fewer_rows_than_splits_are_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"found 3 usable rows .* expected at least 4"):
        load(write(tmp_path / "a.jsonl", pairs(3)))
    assert {len(load(write(tmp_path / "a.jsonl", pairs(4))).rows_of(name)) for name in SPLITS} == {1}


# --- batches ----------------------------------------------------------------------------------------------------------


def test_collate_aligns_where_the_responses_start():
    rows = [Row((5, 6, 7), (8,), "a"), Row((9,), (10, 11), "b"), Row((12, 13), None, "c")]
    batch = collate(rows, pad_token_id=1)
    assert batch["prompt_length"] == 3
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 1], [1, 1, 9, 10, 11], [1, 12, 13, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == batch["prompt_seed"].dtype == torch.long
    assert batch["row_seed"].dtype == torch.long
    assert batch["row_seed"].tolist() == [row.seed for row in rows]
    assert batch["prompt_seed"].tolist() == [row.prompt_seed for row in rows]


def test_a_rows_seed_is_63_bits_of_its_content_and_never_changes():
    row = Row((1, 2), (3,), "a")
    assert row.seed == Row((1, 2), (3,), "elsewhere").seed == 8086938854417251450
    assert (
        len({row.seed, Row((1, 2, 3), (), "a").seed, Row((1, 2, 3), None, "a").seed, Row((1,), (2, 3), "a").seed}) == 4
    )
    assert 0 <= row.seed < 2**63


def test_a_loader_gives_every_row_once_longest_first(tmp_path):
    rows = [{"prompt": words(*range(n % 9 + 1), n), "response": words(n)} for n in range(50)]
    calibration = load(write(tmp_path / "a.jsonl", rows), batch_size=4)
    loader = calibration.loader("verify")
    batches = list(loader)
    lengths = [int(length) for batch in batches for length in batch["attention_mask"].sum(1)]
    seeds = [seed for batch in batches for seed in batch["row_seed"].tolist()]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(seeds) == sorted(row.seed for row in calibration.rows_of("verify"))
    assert [len(batch["row_seed"]) for batch in batches] == [4] * 5
    limited = next(iter(calibration.loader("verify", limit=3)))
    assert set(limited["row_seed"].tolist()) == {row.seed for row in calibration.rows_of("verify")[:3]}


def test_training_batches_depend_on_the_seed_and_the_step_only(tmp_path):
    def steps(seed, start, count):
        loader = load(path, seed=seed).training_steps(batch_size=4, start=start)
        return [batch["row_seed"].tolist() for batch in itertools.islice(loader, count)]

    path = write(tmp_path / "a.jsonl", pairs(60))
    rows = len(load(path).rows_of("fit"))
    per_epoch = -(-rows // 4)
    both = steps(0, 0, 2 * per_epoch)
    first, second = (sum(both[start : start + per_epoch], []) for start in (0, per_epoch))  # noqa: RUF017
    assert sorted(first) == sorted(second)
    assert len(set(first)) == rows
    assert first != second
    assert steps(1, 0, per_epoch) != both[:per_epoch]
    for start in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        assert steps(0, start, 3) == both[start : start + 3]


# --- responses of the full model --------------------------------------------------------------------------------------


def test_responses_are_generated_once_and_cached(prompts_only, tmp_path):
    calls = []

    def generate(rows):
        calls.append(len(rows))
        return [(row.prompt_ids[-1], *range(9)) for row in rows]

    cache = tmp_path / "run" / "responses.json"
    first = load(prompts_only, batch_size=4, max_response_tokens=5)
    before = {name: [row.origin for row in first.rows_of(name)] for name in SPLITS}
    first.fill_responses(generate, cache, made_with="model")
    assert calls == [4, 4, 2]
    assert not first.missing_responses()
    assert {name: [row.origin for row in first.rows_of(name)] for name in SPLITS} == before
    assert first.report.truncated == 10
    assert first.report.response_tokens == {"min": 5, "median": 5, "max": 5}
    assert [path.name for path in cache.parent.iterdir()] == ["responses.json"]

    again = load(prompts_only, max_response_tokens=5)
    again.fill_responses(generate, cache, made_with="model")
    assert calls == [4, 4, 2]
    assert all_rows(again) == all_rows(first)

    load(prompts_only, max_response_tokens=5).fill_responses(generate, cache, made_with="another model")
    load(prompts_only, max_response_tokens=6).fill_responses(generate, cache, made_with="another model")
    assert calls == [4, 4, 2, 8, 2, 8, 2]


def test_an_interrupted_generation_continues_where_it_stopped(prompts_only, tmp_path):
    seen = []

    def generate(rows):
        if len(seen) == 6:
            raise KeyboardInterrupt
        seen.extend(row.origin for row in rows)
        return [(7,) for _ in rows]

    calibration = load(prompts_only, batch_size=3)
    with pytest.raises(KeyboardInterrupt):
        calibration.fill_responses(generate, tmp_path / "cache.json")
    assert calibration.missing_responses()
    rest = []
    calibration.fill_responses(lambda rows: [rest.append(row.origin) or (7,) for row in rows], tmp_path / "cache.json")
    assert sorted(seen + rest) == sorted(all_rows(calibration))
    assert len(rest) == 4


def test_a_cache_that_is_not_ours_is_made_again(prompts_only, tmp_path):
    for content in ("", "[]", '{"responses": 3}'):
        (tmp_path / "cache.json").write_text(content)
        calibration = load(prompts_only)
        calibration.fill_responses(lambda rows: [(7,) for _ in rows], tmp_path / "cache.json")
        assert not calibration.missing_responses()


def test_empty_and_repeated_generations_are_left_out(tmp_path):
    rows = [{"prompt": words(n, n)} for n in range(20)]
    rows.append({"prompt": words(3, 3), "response": words(9)})
    calibration = load(write(tmp_path / "a.jsonl", rows))
    empty = calibration.rows_of("verify")[0].prompt_ids

    def generate(batch):
        return [() if row.prompt_ids == empty else (token(9), EOS) for row in batch]

    calibration.fill_responses(generate, tmp_path / "cache.json")
    assert calibration.report.unusable == {"empty response": 1, "duplicate": 1}
    assert "a.jsonl line 21" in all_rows(calibration)
    assert calibration.report.rows == len(all_rows(calibration)) == 19


def test_a_split_left_empty_by_generation_is_an_input_error(prompts_only, tmp_path):
    with pytest.raises(InputError, match=r"leaves no row in fit, tune, search, verify .*10 empty response"):
        load(prompts_only).fill_responses(lambda rows: [() for _ in rows], tmp_path / "cache.json")


def test_filling_keeps_given_responses(tmp_path):
    calibration = load(write(tmp_path / "a.jsonl", pairs(10)))
    calibration.fill_responses(lambda rows: pytest.fail("nothing is missing"), tmp_path / "cache.json")
    assert not (tmp_path / "cache.json").exists()
