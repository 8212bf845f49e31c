"""Conversations: history, the cache reused between turns, and what a turn is said to cost."""

import builtins
import inspect
import io
import re
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.cli import generate
from pop_lightning.cli.chat import converse, cost
from pop_lightning.core.errors import as_recipe
from pop_lightning.generation.chat import Chat, Turn
from pop_lightning.models.loading import load_model, load_tokenizer
from pop_lightning.pruning.flops import prefill_flops, turn_flops

from tests.helpers import vision
from tests.helpers.workbench import save_base, save_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ 'w90' if m.role == 'user' else 'w91' if m.role == 'assistant' else 'w92' }} "
    "{{ m.content }} <eos> {% endfor %}{% if add_generation_prompt %}w91{% endif %}"
)
WORDS = "w1 w2 w3 w4 w5 w6 w7 w8 w9"


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / request.param
    save_base(folder, request.param)
    save_tokenizer(folder, TEMPLATE)
    return folder


@pytest.fixture
def chat(folder):
    generator = StageAwareGenerator(load_model(str(folder)), PruningPlan(2), tokenizer=load_tokenizer(str(folder)))
    return Chat(generator, max_new_tokens=6)


def rows_of(chat, text):
    """The answer to ``text``, and the numbers of tokens that ran through the first and the last layer at first."""
    layers, rows = chat.generator.decoder.layers, {0: [], -1: []}
    hooks = [
        layers[at].self_attn.q_proj.register_forward_pre_hook(
            lambda _, given, at=at: rows[at].append(given[0].shape[1])
        )
        for at in rows
    ]
    answer = "".join(chat.ask(text))
    for hook in hooks:
        hook.remove()
    return answer, rows[0][0], rows[-1][0]


def test_a_turn_reads_only_what_the_cache_lacks_and_prunes_it(chat):
    _, first, last = rows_of(chat, WORDS)
    assert (first, last) == (chat.turn.tokens, 1) == (12, 1)
    _, first, last = rows_of(chat, WORDS)
    assert chat.turn.cached >= 12
    assert (first, last) == (chat.turn.tokens - chat.turn.cached, 1)
    assert [each["role"] for each in chat.messages] == ["user", "assistant"] * 2


def test_later_turns_of_the_plain_model_are_those_without_a_cache(chat):
    chat.use(full=True)
    model, tokenizer = chat.generator.model, chat.tokenizer
    for text in (WORDS, "w20 w21", "w30"):
        messages = [*chat.messages, {"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert "".join(chat.ask(text)).split() == tokenizer.decode(expected, skip_special_tokens=True).split()
        assert not chat.turn.pruned
    assert chat.turn.cached > 12


def test_later_turns_of_the_pruned_model_continue_its_own_cache(chat):
    generator, cache, ids = chat.generator, chat.generator.decoder.new_cache(), []
    for text in (WORDS, "w20 w21", "w30"):
        rendered = chat.tokenizer.apply_chat_template(
            [*chat.messages, {"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        held = cache.get_seq_length()
        assert rendered[:held] == ids[:held]
        tokens = torch.tensor([rendered])
        output = generator.generate(tokens, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
        ids = output[0].tolist()
        answer = "".join(chat.ask(text))
        assert answer.split() == chat.tokenizer.decode(ids[len(rendered) :], skip_special_tokens=True).split()


def test_a_change_of_the_model_and_a_new_conversation_read_everything_anew(chat):
    list(chat.ask(WORDS))
    chat.use(full=True)
    list(chat.ask("w20"))
    assert (chat.turn.cached, chat.turn.pruned) == (0, False)
    chat.use(full=True)
    list(chat.ask("w21"))
    assert chat.turn.cached > 0
    chat.clear()
    assert chat.messages == []
    list(chat.ask("w22"))
    assert (chat.turn.tokens, chat.turn.cached) == (4, 0)


def test_an_answer_that_is_cut_short_leaves_the_conversation_as_it_was(chat):
    list(chat.ask(WORDS))
    before = list(chat.messages)
    pieces = chat.ask("w20")
    next(pieces)
    pieces.close()
    assert chat.messages == before
    list(chat.ask("w20"))
    assert len(chat.messages) == 4


def test_a_rewritten_history_is_read_again(chat):
    list(chat.ask(WORDS))
    chat.messages[0]["content"] = "w9 " + WORDS
    list(chat.ask("w20"))
    assert chat.turn.cached == 0


def test_a_conversation_beyond_the_context_is_refused_and_goes_on(chat):
    chat.generator.model.config.get_text_config().max_position_embeddings = 24
    list(chat.ask(WORDS))
    with pytest.raises(InputError, match=r"conversation has \d+ tokens; .* context of 24 is too short: begin a new"):
        list(chat.ask(WORDS))
    assert len(chat.messages) == 2


def test_the_estimate_is_the_ratio_of_operations_of_what_the_turn_read(chat):
    decoder, plan, full = chat.generator.decoder, PruningPlan(2), PruningPlan(chat.generator.decoder.num_layers)
    list(chat.ask(WORDS))
    ratio = prefill_flops(decoder, full, 12) / prefill_flops(decoder, plan, 12)
    assert chat.turn.other == pytest.approx(chat.turn.ttft * ratio)
    # Reading in two parts costs what one costs, but for the head and the boundary, which both parts have.
    assert turn_flops(decoder, full, 40, 0) == prefill_flops(decoder, full, 40)
    apart = prefill_flops(decoder, full, 25) + turn_flops(decoder, full, 40, 25)
    head = 2 * decoder.head.in_features * decoder.head.out_features
    assert apart - head == prefill_flops(decoder, full, 40)
    assert turn_flops(decoder, plan, 40, 25) < turn_flops(decoder, full, 40, 25)
    assert turn_flops(decoder, plan, 40, 39) > 0.7 * turn_flops(decoder, full, 40, 39)  # the boundary alone


def test_a_tokenizer_without_a_template_cannot_chat(tmp_path):
    save_base(tmp_path)
    generator = StageAwareGenerator(load_model(str(tmp_path)), PruningPlan(2), tokenizer=load_tokenizer(str(tmp_path)))
    with pytest.raises(InputError, match="needs a chat template"):
        Chat(generator)


def test_commands_answers_and_costs_in_a_terminal(chat, capsys):
    lines = iter([WORDS, "/full", "w20", "/pop", "/what", "", "/new", "w21", "/quit", "never"])
    converse(chat, as_recipe, lambda prompt: next(lines))
    out, err = capsys.readouterr()
    assert out.count("\n") == 3
    costs = [line for line in err.splitlines() if line.startswith("(")]
    assert [line.split(";")[0] for line in costs][::2] == [
        "(12 tokens, 0 of them cached",
        "(4 tokens, 0 of them cached",
    ]
    assert "/quit        end" in err
    assert "the plain model answers" in err
    assert next(lines) == "never"


def test_what_a_turn_cost_says_that_the_other_time_is_an_estimate():
    assert cost(Turn(900, 640, 0.0321, True, 0.0518)) == (
        "(900 tokens, 640 of them cached; TTFT 32 ms pruned, about 52 ms plain, estimated from counted operations)"
    )
    assert cost(Turn(9, 0, 0.05, False, 0.03)).endswith(
        "TTFT 50 ms plain, about 30 ms pruned, estimated from counted operations)"
    )
    assert cost(Turn(9, 0, 0.05, True, None)) == "(9 tokens, 0 of them cached; TTFT 50 ms pruned)"


def test_an_interrupt_stops_the_answer_and_not_the_conversation(chat, capsys, monkeypatch):
    write, lines = builtins.print, iter([WORDS, WORDS])

    def interrupted(*words, **options):
        monkeypatch.undo()
        raise KeyboardInterrupt

    def read(prompt):
        if len(chat.messages) == 0:
            monkeypatch.setattr(builtins, "print", interrupted if not capsys.readouterr().err else write)
        return next(lines, "/quit")

    converse(chat, as_recipe, read)
    assert len(chat.messages) == 2


def test_the_command_reads_lines_from_a_pipe(folder, tmp_path, monkeypatch, capsys):
    generator = StageAwareGenerator(load_model(str(folder)), PruningPlan(2))
    generator.save_pretrained(tmp_path / "artifact")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{WORDS}\n/full\n{WORDS}\n"))
    command = ["chat", "--artifact", str(tmp_path / "artifact"), "--max_new_tokens", "4", "--system", "w5"]
    assert generate.main(command) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 2
    assert ">" not in out
    assert "(15 tokens, 0 of them cached; TTFT" in err


def test_a_cache_is_cut_to_what_a_conversation_keeps_of_the_last_answer(chat):
    list(chat.ask("w5 w6"))
    held, prompt = list(chat._held), chat._prompt
    assert len(held) > prompt + 1
    changed = [*held[:-1], held[-1] + 1, 7]
    decoder = chat.generator.decoder
    moved_on = any(decoder.window(layer) is not None for layer in range(decoder.num_layers))  # and cannot be wound back
    expected = 0 if moved_on else len(held) - 1
    assert chat._reuse(changed, []) == chat._cache.get_seq_length() == expected


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=vision.FAMILIES)
def seeing(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing") / request.param
    vision.save_base(folder, request.param)
    vision.save_pictures(folder / "pictures")
    generator = StageAwareGenerator(load_model(str(folder)), PruningPlan(2))
    generator.save_pretrained(folder / "artifact")
    return folder


# Without the special tokens, which a random model writes too and which its text does not show.
ONLY_WORDS = {"do_sample": False, "suppress_tokens": [0, 1, 2, 3, *range(vision.OPEN, vision.VIDEO + 1)]}


def pictures(folder, *numbers):
    return [str(folder / "pictures" / f"{number}.png") for number in numbers]


def without_a_cache(chat):
    """The last answer, generated from the whole conversation by a model and processor of their own."""
    base = chat.generator.name_or_path
    processor, model = AutoProcessor.from_pretrained(base), load_model(base)
    text = processor.apply_chat_template(chat.messages[:-1], add_generation_prompt=True, tokenize=False)
    opened = [Image.open(image.source).convert("RGB") for image in chat.images]
    inputs = processor(text=[text], images=opened, add_special_tokens=False, return_tensors="pt")
    inputs = {name: value for name, value in inputs.items() if name in inspect.signature(model.forward).parameters}
    output = model.generate(**inputs, max_new_tokens=6, pad_token_id=0, **ONLY_WORDS)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_images_of_several_turns_reach_the_plain_model_as_its_processor_gives_them(seeing):
    chat = Chat(StageAwareGenerator.from_artifact(seeing / "artifact"), max_new_tokens=6, sampling=ONLY_WORDS)
    chat.use(full=True)
    turns = [(WORDS, [0]), ("w20 w21", []), ("w30", [1, 2]), ("w31", [])]
    cached = []
    for text, numbers in turns:
        images = [chat.open(path) for path in pictures(seeing, *numbers)]
        assert "".join(chat.ask(text, images)).split() == without_a_cache(chat).split()
        cached.append(chat.turn.cached)
        assert (chat.turn.other is None) == bool(numbers)  # the vision tower's time is not the decoder's
    assert cached == sorted(cached)
    assert len(set(cached)) == len(turns)
    assert [len(chat.images), len(chat.messages)] == [3, 8]


def test_images_run_through_the_pruned_layers_only_at_the_boundary(seeing):
    chat = Chat(StageAwareGenerator.from_artifact(seeing / "artifact"), max_new_tokens=6, sampling=ONLY_WORDS)
    for text, numbers in ((WORDS, [0]), ("w30", [1])):
        images = [chat.open(path) for path in pictures(seeing, *numbers)]
        rows = []
        hook = chat.generator.decoder.layers[-1].register_forward_pre_hook(
            lambda _, given, rows=rows: rows.append(given[0].shape[1])
        )
        list(chat.ask(text, images))
        hook.remove()
        assert set(rows) == {1}
    assert chat.turn.cached > 0


def test_another_image_in_the_history_is_read_again(seeing):
    chat = Chat(StageAwareGenerator.from_artifact(seeing / "artifact"), max_new_tokens=6, sampling=ONLY_WORDS)
    same, other = pictures(seeing, 0, 0), pictures(seeing, 1)
    list(chat.ask(WORDS, [chat.open(same[0])]))
    chat.images[0] = chat.open(same[1])
    list(chat.ask("w20"))
    assert chat.turn.cached > 0
    if seeing.name == "gemma3":  # images of every size have as many tokens
        chat.images[0] = chat.open(other[0])
        list(chat.ask("w20"))
        assert chat.turn.cached == 0


def test_the_terminal_shows_images_by_path(seeing, capsys, monkeypatch):
    first, second = pictures(seeing, 0, 1)
    damaged = seeing / "damaged.png"
    damaged.write_bytes(b"not an image")
    typed = [f"/image {first}", f"/image '{second}'", "/image none.png", f"/image {damaged}", "/image"]
    typed += ["/image https://example.org/a.png", WORDS, "w20", "/image", f"/image {first}", "/new", "w21"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    chats = []
    monkeypatch.setattr(Chat, "clear", lambda self, clear=Chat.clear: (chats.append(self), clear(self)))
    shown, ask = [], Chat.ask
    monkeypatch.setattr(Chat, "ask", lambda self, text, images: (shown.append(len(images)), ask(self, text, images))[1])
    assert generate.main(["chat", "--artifact", str(seeing / "artifact"), "--max_new_tokens", "4"]) == 0
    assert shown == [2, 0, 0]
    assert chats[0].images == []
    out, err = capsys.readouterr()
    assert out.count("\n") == 3
    assert f"image 2 of the next message: '{second}'\n" in err
    assert "/image: the file 'none.png' does not exist.\n" in err
    assert "/image is damaged or not an image: its format is unknown.\n" in err
    assert err.count("/image needs the path of an image, as in /image photo.png.\n") == 2
    assert "URLs are not fetched by default; set --allow_urls or give the image as a file.\n" in err


def test_a_model_of_text_refuses_an_image_in_one_sentence(chat, capsys):
    lines = iter(["/image photo.png", "w20", "/quit"])
    converse(chat, as_recipe, lambda prompt: next(lines))
    sentence, turn = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"/image cannot be shown: the base \(.+\) reads only text\.", sentence)
    assert turn.startswith("(")
