"""Rows with images: from files and data sets to batches, pop-fit and pop-generate, and every error by its row."""

import base64
import contextlib
import http.server
import io
import json
import os
import pickle
import shutil
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from pop_lightning import InputError, StageAwareGenerator
from pop_lightning.cli import fit, generate
from pop_lightning.data import media
from pop_lightning.data.images import RowImage
from pop_lightning.data.module import CalibrationData
from pop_lightning.data.processor import VisionProcessor, load_processor
from pop_lightning.data.splits import SPLITS
from pop_lightning.generation.batch import generate_file
from pop_lightning.generation.stream import stream
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import load_model, load_tokenizer

from tests.helpers.vision import (
    CLOSE,
    DEEPSTACK,
    FAMILIES,
    IMAGE,
    LAYERS,
    OPEN,
    PLACEHOLDER,
    VIDEO,
    VIDEO_PLACEHOLDER,
    build,
    processor,
    save_base,
    save_frames,
    save_pictures,
    save_rows,
)
from tests.helpers.workbench import arguments, save_tokenizer

PICTURES = 6


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    save_pictures(folder, PICTURES)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*images, text="w5 w6", answer="w7"):
    content = [*images, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def picture(path):
    return {"type": "image", "path": str(path)}


def reader(source, family="qwen3_vl", **settings):
    made = processor(family)
    vision = VisionProcessor(lambda: made, (IMAGE,) if family == "gemma3" else (IMAGE, VIDEO))
    return CalibrationData(source, made.tokenizer, vision=vision, **settings)


def read(path, rows, family="qwen3_vl", **settings):
    return reader(write(path, rows), family, **settings).read_rows()


def encoded(path):
    return base64.b64encode(path.read_bytes()).decode()


# --- reading --------------------------------------------------------------------------------------------------------


def test_an_image_is_the_same_row_however_it_is_given(pictures, tmp_path):
    shutil.copy(pictures / "0.png", tmp_path / "0.png")
    given = [
        {"path": str(pictures / "0.png")},
        {"path": "0.png"},  # next to the file of rows
        {"url": f"file://{pictures}/0.png"},
        {"image": str(pictures / "0.png")},
        {"base64": encoded(pictures / "0.png")},
        {"image": f"data:image/png;base64,{encoded(pictures / '0.png')}"},
    ]
    rows = [chat({"type": "image"} | each) for each in given]
    rows.append(
        chat({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(tmp_path / '0.png')}"}})
    )
    rows.append(chat({"type": "image"}) | {"images": [str(pictures / "0.png")]})
    found = [read(tmp_path / "rows.jsonl", [row])[0] for row in rows]
    assert len({row.seed for row in found}) == 1
    assert len({row.prompt_ids for row in found}) == 1
    assert len({row.images for row in found}) == 1


@pytest.mark.parametrize("form", ["bytes", "bytearray", "pil", "dict", "call"])
def test_bytes_and_pil_images_are_taken(pictures, form):
    content = (pictures / "1.png").read_bytes()
    image = Image.open(io.BytesIO(content))
    given = {"bytes": content, "bytearray": bytearray(content), "pil": image, "dict": {"bytes": content, "path": None},
             "call": lambda: content}[form]  # fmt: skip
    ours = RowImage.of(given, "here").open()
    assert ours.mode == "RGB"
    assert ours.tobytes() == image.convert("RGB").tobytes()


def test_a_row_is_known_by_its_text_and_its_images_wherever_the_files_lie(pictures, tmp_path):
    rows = [chat(picture(pictures / f"{n}.png")) for n in (0, 1)] + [chat()]
    first, second, bare = read(tmp_path / "rows.jsonl", rows, "gemma3")  # whose images are all of one length
    assert first.prompt_ids == second.prompt_ids
    assert len({first.seed, second.seed, bare.seed}) == 3
    shutil.copytree(pictures, tmp_path / "moved")
    moved = read(tmp_path / "rows.jsonl", [chat(picture(tmp_path / "moved" / "0.png"))], "gemma3")[0]
    assert moved.seed == first.seed
    assert moved.content == first.content
    again = read(tmp_path / "rows.jsonl", [rows[0], rows[0], rows[1]], "gemma3")
    assert len(again) == 2  # the doubled one goes


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_hold_a_token_per_feature_and_batches_the_tensors_of_their_rows(pictures, tmp_path, family):
    names = [pictures / f"{number}.png" for number in range(PICTURES)]
    rows = read(
        tmp_path / "rows.jsonl",
        [chat(picture(names[0])), chat(), chat(picture(names[1]), picture(names[2])), chat(text="w9")],
        family,
    )
    data = reader(tmp_path / "rows.jsonl", family)
    batch, made = data.batch(rows), processor(family)
    pixels = [made.image_processor([Image.open(name).convert("RGB")], return_tensors="pt") for name in names[:3]]
    assert torch.equal(batch["vision"]["pixel_values"], torch.cat([each["pixel_values"] for each in pixels]))
    counts = [4, 4, 4]
    if family == "qwen3_vl":
        grids = torch.cat([each["image_grid_thw"] for each in pixels])
        assert torch.equal(batch["vision"]["image_grid_thw"], grids)
        counts = (grids.prod(-1) // 4).tolist()
        assert len(set(counts)) > 1  # of several sizes
    assert set(batch["vision"]) == ({"pixel_values"} if family == "gemma3" else {"pixel_values", "image_grid_thw"})
    spans = [[OPEN, *[IMAGE] * count, CLOSE] for count in counts]
    assert [list(row.prompt_ids[1:-3]) for row in rows[:3]] == [spans[0], [], spans[1] + spans[2]]
    assert (batch["input_ids"] == IMAGE).sum() == sum(counts)
    assert "vision" not in data.batch([rows[1], rows[3]])


def test_two_turns_keep_the_first_turns_image_in_the_prompt(pictures, tmp_path):
    turns = chat(picture(pictures / "0.png"))["messages"] + chat(text="w8 w9", answer="w10")["messages"]
    (row,) = read(tmp_path / "rows.jsonl", [{"messages": turns}])
    words = processor("qwen3_vl").tokenizer.decode([token for token in row.prompt_ids if token != IMAGE])
    assert words == "w1 <|vision_start|> <|vision_end|> w5 w6 w2 w7 <eos> w1 w8 w9 w2"
    assert row.response_ids == (14, 2)
    assert len(row.images) == 1


def test_a_prompt_with_placeholders_and_a_list_of_images_is_a_row(pictures, tmp_path):
    text = f"w3 {PLACEHOLDER['qwen3_vl']} w4 {PLACEHOLDER['qwen3_vl']}"
    rows = [{"prompt": text, "response": "w5", "images": [str(pictures / "0.png"), str(pictures / "1.png")]}]
    (row,) = read(tmp_path / "rows.jsonl", rows)
    assert row.prompt_ids[0] == 7
    assert row.prompt_ids[-1] == CLOSE
    assert len(row.images) == 2


def test_no_decoded_image_is_held_and_rows_can_be_sent_to_other_processes(pictures, tmp_path):
    rows = read(tmp_path / "rows.jsonl", [chat(picture(pictures / f"{n}.png")) for n in range(PICTURES)])
    sent = pickle.loads(pickle.dumps(rows))
    assert sent == rows
    assert len(pickle.dumps(rows)) < 600 * len(rows)  # a path and a hash each
    assert sent[0].images[0].open().size == Image.open(pictures / "0.png").size


def table(pictures, rows=12):
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": [
                {"index": datasets.Value("int64"), "text": datasets.Value("string"), "type": datasets.Value("string")}
            ]}],
            "images": datasets.List(datasets.Image()),
        }
    )  # fmt: skip
    entries = []
    for number in range(rows):
        image, text = {"index": 0, "text": None, "type": "image"}, {"index": None, "text": "w5 w6", "type": "text"}
        answer = {"index": None, "text": f"w{number % 5}", "type": "text"}
        entries.append(
            {
                "messages": [{"role": "user", "content": [image, text]}, {"role": "assistant", "content": [answer]}],
                "images": [Image.open(pictures / f"{number % PICTURES}.png")],
            }
        )
    return datasets.Dataset.from_list(entries, features=features)


def test_a_dataset_with_an_images_column_is_read_without_holding_its_images(pictures, tmp_path):
    table(pictures).save_to_disk(tmp_path / "saved")
    data = reader(tmp_path / "saved", limit=8)
    rows = data.read_rows()
    assert len(rows) == 8
    assert len({row.images[0].digest for row in rows}) > 1
    shown = data.batch(rows[:1])["vision"]["pixel_values"]
    number = int(rows[0].origin.split()[-1])
    expected = processor("qwen3_vl").image_processor([Image.open(pictures / f"{number % PICTURES}.png")])
    assert torch.allclose(shown, torch.as_tensor(expected["pixel_values"]), atol=1e-6)
    assert all(callable(row.images[0].source) for row in rows)
    # Rows with the same text differ by their images, so the sample follows from content alone.
    table(pictures).select(list(reversed(range(12)))).save_to_disk(tmp_path / "reversed")
    turned = reader(tmp_path / "reversed", limit=8).read_rows()
    assert {row.seed for row in turned} == {row.seed for row in rows}


def test_several_sources_are_sampled_evenly(pictures, tmp_path):
    text = write(tmp_path / "text.jsonl", [chat(text=f"w{n} w{n + 1}") for n in range(3, 40)])
    images = write(
        tmp_path / "images.jsonl", [chat(picture(pictures / f"{n % 6}.png"), text=f"w{n}") for n in range(30)]
    )
    rows = reader([text, images], limit=20).read_rows()
    assert sum(bool(row.images) for row in rows) == 10
    few = write(tmp_path / "few.jsonl", [chat(picture(pictures / "0.png"))])
    assert len(reader([text, few], limit=20).read_rows()) == 20
    assert len(reader([text, few]).read_rows()) == 38


def test_urls_are_fetched_only_where_they_are_allowed(pictures, tmp_path):
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(pictures)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    rows = [chat({"type": "image", "url": f"{address}/0.png"})]
    try:
        with pytest.raises(InputError, match=r"rows\.jsonl line 1, image 1 is the URL .*data\.allow_urls: true"):
            read(tmp_path / "rows.jsonl", rows)
        (row,) = read(tmp_path / "rows.jsonl", rows, allow_urls=True)
        assert row.images[0].digest == RowImage.of(pictures / "0.png", "here").digest
        with pytest.raises(InputError, match=r"line 1, image 1: .*none\.png' cannot be fetched \(HTTP Error 404"):
            read(tmp_path / "rows.jsonl", [chat({"type": "image", "url": f"{address}/none.png"})], allow_urls=True)
    finally:
        server.shutdown()
        server.server_close()


class Broken(http.server.BaseHTTPRequestHandler):
    """Answers as no server should."""

    def do_GET(self):
        cut = b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\ncut"
        self.wfile.write(cut if self.path == "/short" else b"HTTP/1.0 many\r\n\r\n")

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("path", "message"), [("a b.png", "URL can't contain"), ("short", "IncompleteRead"), ("status", "HTTP/1.0 many")]
)
def test_an_address_or_an_answer_that_http_does_not_know_is_one_sentence(path, message):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/{path}"
    try:
        with pytest.raises(InputError, match=rf"^row 1: '{address}' cannot be fetched \({message}") as caught:
            RowImage.of(address, "row 1", allow_urls=True)
        assert "\n" not in str(caught.value)
    finally:
        server.shutdown()
        server.server_close()


# --- errors ---------------------------------------------------------------------------------------------------------


def test_every_fault_of_an_image_row_is_named_by_its_line(pictures, tmp_path):
    whole = (pictures / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    good, place = picture(pictures / "0.png"), PLACEHOLDER["qwen3_vl"]
    cases = [
        (chat(picture("none.png")), r"image 1: the file '.*none\.png' does not exist"),
        (chat(good, picture(tmp_path)), r"image 2: the file '.*' cannot be read \(Is a directory\)"),
        (chat(picture("cut.png")), r"image 1 is damaged or not an image \("),
        (chat(good, picture("text.png")), r"image 2 is damaged or not an image: its format is unknown"),
        (chat({"type": "image", "base64": "%%%"}), r"image 1 is not base64 text"),
        (chat({"type": "image", "image": 7}), r"image 1 is a int: expected a path"),
        (chat({"type": "image", "url": "https://example.org/a.png"}), r"image 1 is the URL .* URLs are not fetched"),
        (chat({"type": "image"}), r"has 1 image parts that name no image, and 0 entries in \"images\""),
        (chat(good) | {"images": ["0.png"]}, r"has 0 image parts that name no image, and 1 entries"),
        (chat({"type": "audio", "path": "a.wav"}), r"has message parts of type audio: expected text, image or video"),
        ({"prompt": "w1", "response": "w2", "images": [good["path"]]}, r"has 1 images, and its prompt .* 0 times"),
        ({"prompt": f"{place} {place}", "response": "w2", "images": [good["path"]]}, r"has 1 images, .* 2 times"),
        ({"prompt": f"w1 {place}", "response": "w2"}, r"has the image token '<\|image_pad\|>' in its text with no"),
        (chat(good, text="w1 <|image_pad|>"), r"has 1 images, and its prompt holds '<\|image_pad\|>' 2 times"),
        (chat(good, text="w1 <|video_pad|>"), r"has 0 videos, and its prompt holds '<\|video_pad\|>' 1 times"),
        (chat(good, answer="<|image_pad|>"), r"has the image token '<\|image_pad\|>' in its text with no image"),
    ]  # fmt: skip
    for row, message in cases:
        with pytest.raises(InputError, match=r"rows\.jsonl'? line 3,? ?" + message) as caught:
            read(tmp_path / "rows.jsonl", [chat(), chat(good), row])
        assert "\n" not in str(caught.value)


def test_a_soft_token_outside_gemmas_images_is_a_mismatch(pictures, tmp_path):
    row = chat(picture(pictures / "0.png"), text="w1 <image_soft_token>")
    with pytest.raises(InputError, match=r"line 1 has 1 image tokens in its prompt in addition to '<start_of_image>'"):
        read(tmp_path / "rows.jsonl", [row], "gemma3")


def test_an_image_row_for_a_text_model_is_refused_by_its_line(pictures, tmp_path):
    source = write(tmp_path / "rows.jsonl", [chat(), chat(picture(pictures / "0.png"))])
    data = CalibrationData(source, processor("qwen3_vl").tokenizer)
    with pytest.raises(InputError, match=r"rows\.jsonl line 2 has images, and the model reads text only"):
        data.read_rows()


def test_an_image_that_is_removed_or_changed_after_its_row_was_read_is_named(pictures, tmp_path):
    shutil.copy(pictures / "0.png", tmp_path / "own.png")
    rows = read(tmp_path / "rows.jsonl", [chat(picture("own.png"))])
    data = reader(tmp_path / "rows.jsonl")
    shutil.copy(pictures / "1.png", tmp_path / "own.png")
    with pytest.raises(InputError, match=r"rows\.jsonl line 1, image 1 has changed"):
        data.batch(rows)
    (tmp_path / "own.png").unlink()
    with pytest.raises(InputError, match=r"rows\.jsonl line 1, image 1: the file .* does not exist"):
        data.batch(rows)


def test_without_a_processor_text_rows_work_and_an_image_row_says_what_is_missing(pictures, tmp_path):
    save_tokenizer(tmp_path / "base")  # the tokenizer is there, the processor's other parts are not
    build("qwen3_vl").save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"model\.base .* has no "):
        load_processor(str(tmp_path / "base"))
    vision = VisionProcessor(lambda: load_processor(str(tmp_path / "base")), (IMAGE, VIDEO))
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    rows = [{"prompt": "w5 w6", "response": "w7"}]
    data = CalibrationData(write(tmp_path / "rows.jsonl", rows), tokenizer, vision=vision)
    assert len(data.read_rows()) == 1
    rows.append({"prompt": "w5", "response": "w7", "images": [str(pictures / "0.png")]})
    data = CalibrationData(write(tmp_path / "rows.jsonl", rows), tokenizer, vision=vision)
    with pytest.raises(InputError, match=r"rows\.jsonl line 2 has images, but model\.base .* has no "):
        data.read_rows()


# --- the whole way --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, tmp_path_factory):
    """A fitted run on rows with images, for Qwen3-VL with videos besides; every kind of stage ran."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_base(folder / "base", request.param)
    data = save_rows(folder / "rows.jsonl", videos=request.param == "qwen3_vl")
    changes = {"projection__kind": "full", "projection__steps": 3, "data__limit": 48}
    assert fit.main(arguments(base, data, folder / "run", **changes)) == 0
    return request.param, folder


def test_pop_fit_scores_fits_trains_and_exports_on_rows_with_images(run):
    family, folder = run
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    smallest = DEEPSTACK if family == "qwen3_vl" else 1
    assert {entry["depth"] for entry in metrics["curve"]} == set(range(smallest, LAYERS[family]))
    assert {entry["projection"] for entry in metrics["curve"]} == {"reuse", "closed_form", "full"}
    lossless = [entry["kl"] for entry in metrics["curve"] if entry["depth"] == LAYERS[family] - 1]
    assert max(lossless) < 1e-6
    kl = {(entry["depth"], entry["projection"]): entry["kl"] for entry in metrics["curve"]}
    assert kl[smallest, "closed_form"] < kl[smallest, "reuse"]
    importance = json.loads((folder / "run" / "importance.json").read_text())
    assert all(value > 0 for value in importance["decode"])
    generator = StageAwareGenerator.from_artifact(folder / "run" / "artifact")
    assert type(generator.model).__name__.endswith("ForConditionalGeneration")
    assert generator.plan.depth == metrics["depth"]


def test_a_file_of_rows_with_images_is_answered_by_both_models(run):
    family, folder = run
    generator = StageAwareGenerator.from_artifact(folder / "run" / "artifact")
    output, settings = folder / "out.jsonl", {"max_new_tokens": 4, "limit": 20, "compare": True, "timed_rows": 1}
    summary = generate_file(generator, str(folder / "rows.jsonl"), output, **settings)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert summary["rows"] == len(records) == 20
    assert summary["compared"]["kl"]["rows"] == 20
    data = CalibrationData(folder / "rows.jsonl", generator.tokenizer, vision=generator.vision)
    rows = data.read_rows()
    assert {bool(row.videos) for row in rows[:9]} == ({False} if family == "gemma3" else {True, False})
    for row, record in list(zip(rows, records, strict=False))[:9]:
        inputs = generator.decoder.inputs(data.batch([replace(row, response_ids=())]))
        with generator.full_model():
            expected = {"full_generated": generator.generate(**inputs, max_new_tokens=4, do_sample=False)}
        expected["generated"] = generator.generate(**inputs, max_new_tokens=4, do_sample=False)
        for name, ids in expected.items():
            new = ids[0, len(row.prompt_ids) :].tolist()
            new = new[: new.index(2)] if 2 in new else new
            assert record[name] == generator.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_pop_generate_shows_images_before_the_prompt(run, capsys):
    _, folder = run
    artifact, pictures = str(folder / "run" / "artifact"), folder / "pictures"
    command = ["--artifact", artifact, "--prompt", "w5 w6", "--max_new_tokens", "6"]
    command += ["--image", str(pictures / "0.png"), "--image", str(pictures / "1.png")]
    assert generate.main(command) == 0
    captured = capsys.readouterr()
    assert "TTFT" in captured.err
    generator = StageAwareGenerator.from_artifact(artifact)
    made = AutoProcessor.from_pretrained(folder / "base")
    message = [{"role": "user", "content": [
        picture(pictures / "0.png"), picture(pictures / "1.png"), {"type": "text", "text": "w5 w6"}
    ]}]  # fmt: skip
    inputs = made.apply_chat_template(
        message, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"add_special_tokens": False},
    )  # fmt: skip
    tokens = generator.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert captured.out.strip() == generator.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    opened = [Image.open(pictures / "0.png"), (pictures / "1.png").read_bytes()]
    pieces = stream(generator, "w5 w6", images=opened, max_new_tokens=6)
    assert "".join(piece for piece, _ in pieces).strip() == captured.out.strip()


def test_pop_generate_refuses_what_does_not_fit_in_one_sentence(run, tmp_path, capsys):
    _, folder = run
    artifact, good = str(folder / "run" / "artifact"), str(folder / "pictures" / "0.png")
    (tmp_path / "text.png").write_text("no picture")
    rows = write(tmp_path / "rows.jsonl", [chat(picture(good)), chat({"type": "image", "url": "http://127.0.0.1:9/a"})])
    asked = ["--artifact", artifact, "--prompt", "w1"]
    cases = [
        ([*asked, "--image", "none.png"], "--image 1: the file 'none.png' does not exist"),
        ([*asked, "--image", good, "--image", str(tmp_path / "text.png")], "--image 2 is damaged or not an image"),
        ([*asked, "--image", "https://example.org/a.png"], "set --allow_urls or give"),
        (
            ["--artifact", artifact, "--data", str(rows), "--output", "o", "--image", good],
            "--image (belongs to pop-generate prompt)",
        ),
        (["--benchmark", "--artifact", artifact, "--image", good], "--image (belongs to pop-generate prompt)"),
        (["--artifact", artifact, "--data", str(rows), "--output", str(tmp_path / "o")], "rows.jsonl line 2, image 1"),
    ]
    for command, expected in cases:
        assert generate.main(command) == 2, command
        message = capsys.readouterr().err
        assert expected in message, (command, message)
        assert "Traceback" not in message


def test_prompts_without_responses_are_answered_by_the_full_model_with_their_images_and_videos(tmp_path):
    base = save_base(tmp_path / "base", "qwen3_vl")
    names, frames = save_pictures(tmp_path / "pictures"), save_frames(tmp_path / "pictures")
    place = PLACEHOLDER["qwen3_vl"]
    rows = []
    for number in range(40):
        images = [f"pictures/{names[number % PICTURES]}"] * (number % 2)
        videos = [[f"pictures/{frames[(number + each) % 8]}" for each in range(3)]] * (number % 4 > 1)
        text = f"w{number + 3} {VIDEO_PLACEHOLDER * len(videos)} {place * len(images)}".strip()
        rows.append({"prompt": text, "images": images, "videos": videos})
    data = write(tmp_path / "rows.jsonl", rows)
    # Most prompts end in the closing token of an image or a frame: with boundary 3 the boundary begins inside it.
    changes = {"boundary": 3, "projection__kind": "closed_form", "data__max_response_tokens": 4}
    assert fit.main(arguments(base, data, tmp_path / "run", **changes)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    lossless = [entry for entry in metrics["curve"] if entry["depth"] == LAYERS["qwen3_vl"] - 1]
    assert all(entry["kl"] < 1e-6 and entry["agreement"] == 1.0 for entry in lossless)
    full = next(row for row in metrics["comparison"] if row["name"] == "full model")
    assert full["exact_match"] == 1.0  # the full model writes its own answers again, images and all


def test_pop_fit_refuses_what_does_not_fit_in_one_sentence(tmp_path, capsys, monkeypatch):
    gemma, qwen = (save_base(tmp_path / family, family) for family in FAMILIES)
    names = save_pictures(tmp_path / "pictures")
    rows = [
        {"prompt": f"w{n + 3} {PLACEHOLDER['gemma3']}", "response": "w5", "images": [f"pictures/{names[n % PICTURES]}"]}
        for n in range(30)
    ]
    ends_in_image = write(tmp_path / "ends.jsonl", rows)
    chats = save_rows(tmp_path / "chats.jsonl")
    broken = write(
        tmp_path / "broken.jsonl", [*map(json.loads, chats.read_text().splitlines()), *[chat(picture("no.png"))] * 9]
    )
    cases = [
        (gemma, ends_in_image, {"boundary": 3}, "boundary 3 begins inside an image of ends.jsonl line"),
        (qwen, chats, {"budget__candidates": [3, 1]}, f"the smallest depth allowed is {DEEPSTACK}"),
        (qwen, broken, {}, "broken.jsonl line 61, image 1: the file"),
        (qwen, ends_in_image, {}, "has 1 images, and its prompt holds '<|image_pad|>' 0 times"),
    ]
    for number, (base, data, changes, expected) in enumerate(cases):
        assert fit.main(arguments(base, data, tmp_path / f"run{number}", **changes)) == 2, expected
        message = capsys.readouterr().err
        assert expected in message, message
        assert "Traceback" not in message

    # Where the processor's package is missing, the sentence says so and names the row.
    def missing(*args, **kwargs):
        raise ImportError("Qwen3VLVideoProcessor requires the Torchvision library but it was not found.")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", missing)
    assert fit.main(arguments(qwen, chats, tmp_path / "no_torchvision")) == 2
    message = capsys.readouterr().err
    assert "chats.jsonl line 2 has images, but --model.base" in message
    assert "Torchvision" in message


def test_the_model_class_follows_from_the_config(tmp_path):
    for family in FAMILIES:
        build(family).save_pretrained(tmp_path / family)
        model = load_model(str(tmp_path / family))
        assert type(model) is type(build(family))
        decoder = Decoder(model)
        assert decoder.body is model.model.language_model
        assert decoder.vision.image == IMAGE
        text = build(family).model.language_model
        assert decoder.num_layers == len(text.layers)


def test_splits_keep_rows_of_one_prompt_and_image_together(tmp_path):
    data = reader(save_rows(tmp_path / "rows.jsonl", 80))
    data.setup()
    owner = {}
    for name in SPLITS:
        for row in data.rows_of(name):
            assert owner.setdefault(row.prompt, name) == name
    assert {bool(row.images) for name in SPLITS for row in data.rows_of(name)} == {True, False}


def test_a_pipe_in_place_of_an_image_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png' cannot be read \(it is not a regular file\)"):
        RowImage.of({"path": str(tmp_path / "pipe.png")}, "row 1").open()


def test_a_device_in_place_of_an_image_is_refused_instead_of_read_without_end(tmp_path):
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"zero\.png' cannot be read \(it is not a regular file\)"):
        RowImage.of({"path": str(tmp_path / "zero.png")}, "row 1").open()


def serve(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_redirect_does_not_lead_into_a_private_network(monkeypatch):
    asked = []

    class Inside(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/start":
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{self.server.server_port}/secret")
            else:
                self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = serve(Inside)
    try:
        with pytest.raises(InputError, match="redirects to localhost, which is not a public address"):
            media._fetched(f"http://127.0.0.1:{server.server_port}/start", "row 1")
        assert asked == ["/start"]
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("limit", "value", "message"), [("MOST_BYTES", 1 << 20, "larger than 1 MiB"), ("MOST_SECONDS", 0.5, "longer than")]
)
def test_a_fetch_is_bounded_in_size_and_time(monkeypatch, limit, value, message):
    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(400):
                    self.wfile.write(bytes(8 << 10))
                    time.sleep(0.005)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(media, limit, value)
    server = serve(Endless)
    try:
        with pytest.raises(InputError, match=message):
            media._fetched(f"http://127.0.0.1:{server.server_port}/", "row 1")
    finally:
        server.shutdown()
        server.server_close()


def test_headers_that_are_sent_slowly_count_as_well(monkeypatch):
    class Slow(BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\nX: " + 100 * b"x":
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(media, "MOST_SECONDS", 0.5)
    server = serve(Slow)
    server.daemon_threads = True
    server.block_on_close = False
    try:
        start = time.monotonic()
        with pytest.raises(InputError, match=r"longer than 0\.5 seconds"):
            media._fetched(f"http://127.0.0.1:{server.server_port}/", "row 1")
        assert time.monotonic() - start < 8
    finally:
        server.shutdown()
        server.server_close()
