"""Rows with videos: exactness from a row to greedy tokens, what a video may be given as, and every error by its row."""

import base64
import importlib
import itertools
import pickle
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import video_utils
from transformers.video_utils import VideoMetadata

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.cli import fit, generate
from pop_lightning.data import videos
from pop_lightning.data.images import RowImage
from pop_lightning.data.module import CalibrationData
from pop_lightning.data.processor import VisionProcessor
from pop_lightning.data.videos import RowVideo
from pop_lightning.generation.artifact import write_artifact
from pop_lightning.generation.base_identity import base_identity
from pop_lightning.generation.stream import stream
from pop_lightning.pruning.passes import student_logits, teacher_pass

from tests.data.test_vision_data import chat, read, reader, write
from tests.helpers.families import relative
from tests.helpers.vision import (
    DEEPSTACK,
    FAMILIES,
    IMAGE,
    LAYERS,
    PLACEHOLDER,
    VIDEO,
    VIDEO_PLACEHOLDER,
    SmallQwen3VLProcessor,
    build,
    greedy,
    processor,
    save_base,
    save_frames,
    save_pictures,
    substituted,
    two_pass,
)
from tests.helpers.workbench import arguments as fit_arguments
from tests.pruning.test_vision import TEXT, shared

FRAMES = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Frames and pictures, and the same frames as a file of ``frames_decoder``: 4 a second."""
    folder = tmp_path_factory.mktemp("videos")
    names = save_frames(folder, FRAMES)
    save_pictures(folder, 3)
    frames = np.stack([np.asarray(Image.open(folder / name)) for name in names])
    with (folder / "clip.mp4").open("wb") as file:
        np.savez(file, frames=frames, fps=4.0)
    return folder


@pytest.fixture
def frames_decoder(monkeypatch):
    """A decoder as Transformers' own are, of files that hold bare arrays."""

    def read(path, sample_indices_fn, **settings):
        held = np.load(path)
        metadata = VideoMetadata(len(held["frames"]), fps=float(held["fps"]), video_backend="arrays")
        metadata.frames_indices = sample_indices_fn(metadata=metadata)
        return held["frames"][metadata.frames_indices], metadata

    monkeypatch.setitem(video_utils.VIDEO_DECODERS, "arrays", read)
    monkeypatch.setattr(videos, "_DECODERS", {"torchcodec": "no_such_package", "arrays": "numpy"})


@pytest.fixture(autouse=True)
def decoder_looked_for():
    """Which decoder loads is found out once in a process; tests change the answer."""
    videos._decoder.cache_clear()
    yield
    videos._decoder.cache_clear()


def frames(folder, *numbers, **timing):
    return {"type": "video", "video": [str(folder / f"frame{number}.png") for number in numbers], **timing}


def clip(path, **timing):
    return {"type": "video", "path": str(path), **timing}


def decoded(row):
    return processor("qwen3_vl").tokenizer.decode([token for token in row.prompt_ids if token != VIDEO])


def words(*numbers):
    return {"type": "text", "text": " ".join(f"w{number}" for number in numbers)}


# --- exactness ------------------------------------------------------------------------------------------------------

LAYOUTS = {  # v is a video of four frames, V one of three, i an image, a digit so many words
    "start": ["v6"],
    "middle": ["5v4"],
    "adjacent": ["6V"],  # the boundary token closes the video
    "with images": ["2i3v4i2"],
    "mixed": ["4v9i2", "7", "3i2", "V1v3", "iv5"],
}


def prompt(folder, layout):
    parts = {
        "v": (frames(folder, 0, 1, 2, 3, fps=2), VIDEO_PLACEHOLDER),
        "V": (frames(folder, 4, 5, 6), VIDEO_PLACEHOLDER),
        "i": (str(folder / "0.png"), PLACEHOLDER["qwen3_vl"]),
    }
    text = [" ".join(f"w{7 + n}" for n in range(int(each))) if each.isdigit() else parts[each][1] for each in layout]
    return {
        "prompt": " ".join(text),
        "response": "w5 w6 w7",
        "images": [parts[each][0] for each in layout if each == "i"],
        "videos": [parts[each][0] for each in layout if each in "vV"],
    }


def compare(folder, path, attention, depth, boundary, layout):
    """A row's way from the file to logits, caches and greedy tokens, against two plain passes over the batch; where the
    boundary holds features, which the second pass cannot take, to logits against one pass."""
    rows = read(path, [prompt(folder, each) for each in LAYOUTS[layout]])
    data, model = reader(path), shared("qwen3_vl", attention)
    batch = data.batch([replace(row, response_ids=()) for row in rows])
    assert (batch["input_ids"] == VIDEO).sum() == batch["vision"]["video_grid_thw"].prod(-1).sum() // 4
    generator = StageAwareGenerator(model, PruningPlan(depth, boundary))
    call = generator.decoder.inputs(batch)
    ours = generator.prefill(**call)
    features, length = torch.isin(batch["input_ids"], torch.tensor([IMAGE, VIDEO])), batch["prompt_length"]
    if boundary < length and features[:, length - boundary :].any():
        assert relative(ours.logits, substituted(model, batch, depth, boundary)[:, -1:]) < 1e-5
    else:
        logits, cache = two_pass(model, batch, depth, boundary)
        assert relative(ours.logits, logits) < 1e-5
        visible = batch["attention_mask"].bool()
        for layer in range(LAYERS["qwen3_vl"]):
            for name in ("keys", "values"):
                both = (each.layers[layer] for each in (ours.past_key_values, cache))
                a, b = (getattr(each, name).transpose(1, 2)[visible] for each in both)
                assert relative(a, b) < 1e-5, (layer, name)
        tokens = generator.generate(**call, **TEXT)[:, length:]
        assert torch.equal(tokens, greedy(model, logits, cache, batch, TEXT["max_new_tokens"]))
    whole = data.batch(rows)
    trace, _ = teacher_pass(generator.decoder, whole, depth)
    student = student_logits(
        generator.projections, generator.plan, trace, whole["attention_mask"], whole["prompt_length"]
    )
    expected = substituted(model, whole, depth, boundary)[:, whole["prompt_length"] - 1 : -1]
    assert relative(student, expected) < 1e-5


@pytest.mark.parametrize(
    ("attention", "depth", "boundary", "layout"),
    [
        ("sdpa", 2, 1, "start"),
        ("eager", 3, 3, "middle"),
        ("sdpa", 2, 1, "adjacent"),
        ("eager", 2, 5, "adjacent"),  # the boundary begins inside a frame
        ("eager", 2, 0, "with images"),
        ("sdpa", 3, 2, "mixed"),
        ("sdpa", 2, 1, "mixed"),
    ],
)
def test_from_rows_with_videos_prefill_and_greedy_tokens_equal_two_passes(
    folder, tmp_path, attention, depth, boundary, layout
):
    compare(folder, tmp_path / "rows.jsonl", attention, depth, boundary, layout)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_from_rows_with_videos_prefill_and_greedy_tokens_equal_two_passes_in_full(folder, tmp_path, attention, layout):
    for depth, boundary in itertools.product(range(DEEPSTACK, LAYERS["qwen3_vl"]), (0, 1, 5, 60)):
        compare(folder, tmp_path / "rows.jsonl", attention, depth, boundary, layout)


# --- reading --------------------------------------------------------------------------------------------------------


def test_batches_hold_the_tensors_of_their_rows_in_order(folder, tmp_path):
    """Every processor's call with a single image or video is the reference."""
    rows = read(tmp_path / "rows.jsonl", [prompt(folder, each) for each in ("v1i", "3", "i2V", "V1v2i")])
    vision, made = reader(tmp_path / "rows.jsonl").batch(rows)["vision"], processor("qwen3_vl")

    def alone(numbers):
        shown = np.stack([np.asarray(Image.open(folder / f"frame{number}.png")) for number in numbers])
        return made.video_processor([shown], [VideoMetadata(len(numbers))], False)

    four, three = alone([0, 1, 2, 3]), alone([4, 5, 6])
    for name in ("pixel_values_videos", "video_grid_thw"):
        assert torch.equal(vision[name], torch.cat([each[name] for each in (four, three, three, four)]))
    image = made.image_processor([Image.open(folder / "0.png").convert("RGB")], return_tensors="pt")
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(vision[name], torch.cat([image[name]] * 3))
    assert set(vision) == {"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"}


def test_times_come_from_fps_or_from_the_metadata(folder, tmp_path):
    metadata = {"fps": 10, "frames_indices": [0, 10, 20, 20], "total_num_frames": 47}
    rows = [
        chat(frames(folder, 0, 1, 2, 3, fps=1)),
        chat(frames(folder, 0, 1, 2, 3, video_metadata=metadata)),
        chat(frames(folder, 0, 1, 2, 3)),
        chat({"type": "video", "fps": 1}) | {"videos": [frames(folder, 0, 1, 2, 3)["video"]]},
    ]
    found = [decoded(row) for row in read(tmp_path / "rows.jsonl", rows[:3])]
    each = "<|vision_start|> <|vision_end|>"
    around = "w1 <|vision_start|> {} <|vision_end|> w5 w6 w2"
    assert found[0] == around.format(f"<0.5 seconds> {each} <unk> seconds> {each}")  # 2.5
    assert found[1] == around.format(f"<0.5 seconds> {each} <2.0 seconds> {each}")
    assert found[2] == around.format(f"<0.0 seconds> {each} <unk> seconds> {each}")  # 24 a second: 0.1
    (listed,) = read(tmp_path / "rows.jsonl", rows[3:])
    assert decoded(listed) == found[0]


def test_a_video_is_the_same_row_however_it_is_given(folder, tmp_path, frames_decoder):
    shutil.copy(folder / "clip.mp4", tmp_path / "clip.mp4")
    encoded = base64.b64encode((folder / "clip.mp4").read_bytes()).decode()
    given = [
        {"path": str(folder / "clip.mp4")},
        {"path": "clip.mp4"},  # next to the file of rows
        {"url": f"file://{folder}/clip.mp4"},
        {"video": str(folder / "clip.mp4")},
        {"base64": encoded},
        {"video": f"data:video/mp4;base64,{encoded}"},
    ]
    rows = [chat({"type": "video"} | each) for each in given]
    rows.append(chat({"type": "video"}) | {"videos": ["clip.mp4"]})
    found = [read(tmp_path / "rows.jsonl", [row])[0] for row in rows]
    assert len({(row.seed, row.prompt_ids, row.videos) for row in found}) == 1
    for source in ((folder / "clip.mp4").read_bytes(), lambda: (folder / "clip.mp4").read_bytes()):
        assert RowVideo.of(source, "here") == found[0].videos[0]


def test_a_file_is_sampled_as_the_processor_says_or_at_its_own_fps(folder, tmp_path, frames_decoder):
    path = folder / "clip.mp4"  # 7 frames, 4 a second
    rows = read(tmp_path / "rows.jsonl", [chat(clip(path)), chat(clip(path, fps=4)), chat(clip(path, fps=1))])
    assert len({row.seed for row in rows}) == 3  # each shows something else
    grids = reader(tmp_path / "rows.jsonl").batch(rows)["vision"]["video_grid_thw"]
    assert grids[:, 0].tolist() == [2, 4, 1]  # 3, 7 and 1 frames, two to a step
    assert "<0.2 seconds>" in decoded(rows[0])  # frames 0 and 2: halfway to half a second
    data = reader(tmp_path / "rows.jsonl")
    shown = data.batch(rows[1:2])["vision"]["pixel_values_videos"]
    listed = read(tmp_path / "rows.jsonl", [chat(frames(folder, *range(FRAMES), fps=4))])
    assert torch.equal(shown, data.batch(listed)["vision"]["pixel_values_videos"])
    assert listed[0].prompt_ids == rows[1].prompt_ids


def test_decoders_are_looked_for_once_whatever_is_opened(folder, frames_decoder, monkeypatch):
    tried, load = [], importlib.import_module

    def counted(name):
        tried.append(name)
        return load(name)

    monkeypatch.setattr(importlib, "import_module", counted)
    for _ in range(3):
        RowVideo.of(folder / "clip.mp4", "here").open(lambda fps: None)
    assert tried == ["no_such_package", "numpy"]


def test_a_decoder_that_puts_the_channels_first_gives_the_same_frames(folder, frames_decoder, monkeypatch):
    video = RowVideo.of(folder / "clip.mp4", "here")
    expected, _ = video.open(lambda fps: None)
    assert expected.shape == (FRAMES, 16, 24, 3)
    arrays = video_utils.VIDEO_DECODERS["arrays"]

    def read(path, sample_indices_fn, **settings):  # as torchcodec does
        found, metadata = arrays(path, sample_indices_fn)
        return torch.from_numpy(found).permute(0, 3, 1, 2).contiguous(), metadata

    monkeypatch.setitem(video_utils.VIDEO_DECODERS, "arrays", read)
    assert np.array_equal(video.open(lambda fps: None)[0], expected)


def test_a_row_is_known_by_what_its_videos_show_wherever_they_lie(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    rows = read(
        tmp_path / "rows.jsonl",
        [
            chat(frames(folder, 0, 1, fps=2)),
            chat(frames(tmp_path / "moved", 0, 1, fps=2)),  # the doubled one goes
            chat(frames(folder, 1, 0, fps=2)),
            chat(frames(folder, 0, 1, fps=3)),
            chat(),
        ],
    )
    assert len(rows) == len({row.seed for row in rows}) == 4
    assert rows[0].prompt_ids == rows[1].prompt_ids
    sent = pickle.loads(pickle.dumps(rows))
    assert sent == rows
    assert len(pickle.dumps(rows)) < 1500 * len(rows)  # paths and hashes, no frame
    given, _ = sent[0].videos[0].open(lambda fps: None)
    assert np.array_equal(given[1], np.asarray(Image.open(folder / "frame1.png")))


@pytest.mark.parametrize("column", ["frames", "files"])
def test_a_datasets_videos_column_is_read_row_by_row(folder, tmp_path, column, frames_decoder):
    messages = {"role": datasets.Value("string"), "content": [
        {"text": datasets.Value("string"), "type": datasets.Value("string")}
    ]}  # fmt: skip
    kind = datasets.List(datasets.Image()) if column == "frames" else datasets.Video()
    features = datasets.Features({"messages": [messages], "videos": datasets.List(kind)})
    content, answer = (
        [{"type": "video", "text": None}, {"type": "text", "text": "w5"}],
        [{"type": "text", "text": "w6"}],
    )
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    entries = []
    for number in range(4):
        shown = [str(folder / f"frame{number + each}.png") for each in (0, 1)]
        entries.append({"messages": turns, "videos": [shown if column == "frames" else str(folder / "clip.mp4")]})
    datasets.Dataset.from_list(entries, features=features).save_to_disk(tmp_path / "saved")
    data = reader(tmp_path / "saved")
    rows = data.read_rows()
    given = frames(folder, 0, 1) if column == "frames" else clip(folder / "clip.mp4")
    (expected,) = read(tmp_path / "rows.jsonl", [chat(given, text="w5", answer="w6")])
    assert len(rows) == (4 if column == "frames" else 1)  # the same file four times is one row
    assert rows[0].prompt_ids == expected.prompt_ids
    ours, reference = (data.batch([row])["vision"]["pixel_values_videos"] for row in (rows[0], expected))
    assert torch.equal(ours, reference)


def test_frames_of_a_videos_column_take_the_times_of_their_part(folder, tmp_path):
    metadata = {"fps": 10, "frames_indices": [0, 10, 20, 20]}
    text = datasets.Value("string")
    times = {"fps": datasets.Value("int64"), "frames_indices": datasets.List(datasets.Value("int64"))}
    part = {"type": text, "text": text, "video_metadata": times}
    features = datasets.Features({
        "messages": [{"role": text, "content": [part]}], "videos": datasets.List(datasets.List(datasets.Image()))
    })  # fmt: skip
    said = [{"type": "text", "text": each, "video_metadata": None} for each in ("w5", "w6")]
    shown = {"type": "video", "text": None, "video_metadata": metadata}
    turns = [{"role": "user", "content": [shown, said[0]]}, {"role": "assistant", "content": said[1:]}]
    given = frames(folder, 0, 1, 2, 3, video_metadata=metadata)
    entry = {"messages": turns, "videos": [given["video"]]}
    datasets.Dataset.from_list([entry], features=features).save_to_disk(tmp_path / "saved")
    (row,) = reader(tmp_path / "saved").read_rows()
    (expected,) = read(tmp_path / "rows.jsonl", [chat(given, text="w5", answer="w6")])
    assert decoded(row) == decoded(expected)
    assert "<2.0 seconds>" in decoded(row)
    ours, reference = (reader(tmp_path / "saved").batch([each])["vision"] for each in (row, expected))
    assert torch.equal(ours["pixel_values_videos"], reference["pixel_values_videos"])


def test_times_that_are_null_are_not_given(folder, tmp_path):
    null = {"fps": None, "frames_indices": None, "total_num_frames": None}
    rows = [chat(frames(folder, 0, 1, fps=2)), chat(frames(folder, 0, 1, fps=2, video_metadata=null))]
    assert len(read(tmp_path / "rows.jsonl", rows)) == 1  # one row, twice


# --- errors ---------------------------------------------------------------------------------------------------------


def test_every_fault_of_a_video_row_is_named_by_its_line(folder, tmp_path, frames_decoder):
    whole = (folder / "clip.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 32)).save(tmp_path / "other.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "tiny.png")
    good, place = frames(folder, 0, 1), VIDEO_PLACEHOLDER
    cases = [
        (chat(clip("none.mp4")), r"video 1: the file '.*none\.mp4' does not exist"),
        (chat(good, clip(tmp_path)), r"video 2: the file '.*' cannot be read \(Is a directory\)"),
        (chat(clip("cut.mp4")), r"video 1 is damaged or not a video \(arrays: "),
        (chat(good, {"type": "video", "video": [*good["video"], "none.png"]}), r"video 2, frame 3: the file "),
        (chat({"type": "video", "video": [*good["video"], "text.png"]}), r"video 1, frame 3 is damaged or not"),
        (chat({"type": "video", "video": [good["video"][0], "other.png"]}), r"video 1 has frames of 8x32 and 24x16 "),
        (chat({"type": "video", "video": ["tiny.png", "tiny.png"]}), r"has a video that the processor refuses: frames"),
        (chat({"type": "video", "video": []}), r"video 1 is an empty list: expected its frames"),
        (chat({"type": "video", "video": 7}), r"video 1 is a int: expected a path, bytes, base64 text or a list of fr"),
        (chat({"type": "video", "base64": "%%%"}), r"video 1 is not base64 text"),
        (chat(clip("https://example.org/a.mp4")), r"video 1 is the URL .* URLs are not fetched .* the video as a file"),
        (chat({"type": "video", "video": ["https://example.org/a.png"]}), r"video 1, frame 1 is the URL "),
        (chat(frames(folder, 0, 1, fps=0)), r"video 1 has \"fps\" 0: expected a number above 0"),
        (chat(clip(folder / "clip.mp4", video_metadata={"fps": 2})), r"video 1 is a file with \"video_metadata\""),
        (chat(frames(folder, 0, 1, video_metadata={"rate": 2})), r"video 1 has \"video_metadata\" .* an object of"),
        (chat(frames(folder, 0, 1, video_metadata={"frames_indices": [0]})), r"video 1 has 2 frames and \"frames_ind"),
        *(
            (chat(frames(folder, 0, 1, video_metadata={"frames_indices": indices})), r"video 1 has 2 frames and \"fram")
            for indices in ([0, -1], [0, 0.5], [False, True], [0, "1"], [0, None], "01")
        ),
        *(
            (chat(frames(folder, 0, 1, video_metadata={name: number})), rf"video 1, \"video_metadata\" has \"{name}\" ")
            for name in ("fps", "total_num_frames")
            for number in (0, -1, True, "2", float("inf"), float("nan"))
        ),
        (chat({"type": "video"}), r"has 1 video parts that name no video, and 0 entries in \"videos\""),
        (chat(good) | {"videos": ["clip.mp4"]}, r"has 0 video parts that name no video, and 1 entries"),
        ({"prompt": "w1", "response": "w2", "videos": [good]}, r"has 1 videos, and its prompt .* 0 times"),
        ({"prompt": f"{place} {place}", "response": "w2", "videos": [good]}, r"has 1 videos, .* 2 times"),
        ({"prompt": f"w1 {place}", "response": "w2"}, r"has the video token '<\|video_pad\|>' in its text wi"),
        (chat(good, text="w1 <|image_pad|>"), r"has 0 images, and its prompt holds '<\|image_pad\|>' 1 times"),
        (chat(good, answer="<|video_pad|>"), r"has the video token '<\|video_pad\|>' in its text with no video"),
        ({"prompt": "w1", "response": "w2", "videos": "clip.mp4"}, r"has \"videos\" of type str: expected a list"),
    ]  # fmt: skip
    for row, message in cases:
        with pytest.raises(InputError, match=r"rows\.jsonl'? line 3,? ?" + message) as caught:
            read(tmp_path / "rows.jsonl", [chat(), chat(good), row])
        assert "\n" not in str(caught.value)


def test_a_file_without_a_decoder_names_the_row_and_the_package(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "_DECODERS", {"pyav": "no_such_package"})
    with pytest.raises(InputError, match=r"rows\.jsonl line 1, video 1 is a file, and no package .* pip install av"):
        read(tmp_path / "rows.jsonl", [chat(clip(folder / "clip.mp4"))])
    assert len(read(tmp_path / "rows.jsonl", [chat(frames(folder, 0, 1))])) == 1  # frames need none


def test_a_file_that_ends_before_its_frames_do_is_damaged(folder, tmp_path, frames_decoder, monkeypatch):
    read_whole = video_utils.VIDEO_DECODERS["arrays"]

    def cut(path, sample_indices_fn, **settings):
        found, metadata = read_whole(path, sample_indices_fn)
        return found[:-1], metadata

    monkeypatch.setitem(video_utils.VIDEO_DECODERS, "arrays", cut)
    with pytest.raises(InputError, match=r"line 1, video 1 is damaged or not a video \(arrays: 2 of 3 frames"):
        read(tmp_path / "rows.jsonl", [chat(clip(folder / "clip.mp4"))])


def test_a_video_for_a_model_that_reads_none_is_refused_by_its_line(folder, tmp_path):
    with pytest.raises(InputError, match=r"rows\.jsonl line 2 has videos, but the model reads only images"):
        read(tmp_path / "rows.jsonl", [chat(), chat(frames(folder, 0, 1))], "gemma3")
    data = CalibrationData(tmp_path / "rows.jsonl", processor("qwen3_vl").tokenizer)
    with pytest.raises(InputError, match=r"line 2 has videos, and the model reads text only; .* that reads videos"):
        data.read_rows()

    class ImagesOnly(SmallQwen3VLProcessor):
        video_processor = None

    made = processor("qwen3_vl")
    vision = VisionProcessor(lambda: ImagesOnly(made.image_processor, made.tokenizer), (IMAGE, VIDEO))
    data = CalibrationData(tmp_path / "rows.jsonl", made.tokenizer, vision=vision)
    with pytest.raises(InputError, match=r"line 2 has videos, but the base has no video processor") as caught:
        data.read_rows()
    assert str(caught.value).endswith("set model.base to one that has it, or leave the videos out.")
    generator = StageAwareGenerator(shared("qwen3_vl"), PruningPlan(2), tokenizer=made.tokenizer, vision=vision)
    with pytest.raises(InputError, match=r"^--video was given, but the base has no video processor") as caught:
        list(stream(generator, "w1", videos=[[folder / "frame0.png"]], max_new_tokens=1))
    assert str(caught.value).endswith("set model.base to one that has it, or leave the videos out.")


def test_a_feature_token_outside_the_placeholders_is_named_by_its_kind(folder):
    made = processor("qwen3_vl")
    made.video_token = "w9"  # one placeholder for a video, and another for each of its features
    vision = VisionProcessor(lambda: made, (IMAGE, VIDEO))
    image = [RowImage.of(folder / "0.png", "here")]
    text = f"{PLACEHOLDER['qwen3_vl']} <|video_pad|> <|video_pad|>"
    with pytest.raises(InputError, match=r"^row 1 has 2 video tokens in its prompt in addition to 'w9', .* video: "):
        vision.encode(text, image, [], "row 1", special=False)
    made.video_token = None
    with pytest.raises(InputError, match=r"^row 1 has 2 video tokens in its prompt: remove them\.$"):
        vision.encode(text, image, [], "row 1", special=False)


def test_a_video_that_is_removed_or_changed_after_its_row_was_read_is_named(folder, tmp_path, frames_decoder):
    shutil.copytree(folder, tmp_path / "own")
    rows = read(tmp_path / "rows.jsonl", [chat(clip("own/clip.mp4")), chat(frames(tmp_path / "own", 0, 1))])
    data = reader(tmp_path / "rows.jsonl")
    shutil.copy(tmp_path / "own" / "frame2.png", tmp_path / "own" / "frame1.png")
    with pytest.raises(InputError, match=r"rows\.jsonl line 2, video 1, frame 2 has changed"):
        data.batch(rows[1:])
    (tmp_path / "own" / "clip.mp4").write_bytes(b"other")
    with pytest.raises(InputError, match=r"rows\.jsonl line 1, video 1 has changed"):
        data.batch(rows[:1])
    (tmp_path / "own" / "clip.mp4").unlink()
    with pytest.raises(InputError, match=r"rows\.jsonl line 1, video 1: the file .* does not exist"):
        data.batch(rows[:1])


def test_with_its_base_in_shards_a_row_with_a_video_is_refused(folder, tmp_path, capsys):
    base = save_base(tmp_path / "base", "qwen3_vl")
    rows = [chat(text=f"w{number}") for number in range(5, 35)] + [chat(frames(folder, 0, 1))]
    command = fit_arguments(base, write(tmp_path / "rows.jsonl", rows), tmp_path / "run")
    assert fit.main([*command, "--check", "--trainer.strategy", "deepspeed_stage_3"]) == 2
    assert "rows.jsonl line 31 has videos, and trainer.strategy deepspeed_stage_3 needs" in capsys.readouterr().err


# --- pop-generate ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """By family an artifact of reused projections over a base in a folder."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        model = build(family)
        write_artifact(
            folder / "artifact",
            plan=PruningPlan(LAYERS[family] - 2),
            kind="reuse",
            state={},
            base=base_identity(model, str(save_base(folder / "base", family, model))),
            recipe={"seed": 0, "data": {"calibration": "rows.jsonl"}},
            measured={"verified": None, "curve": []},
        )
        found[family] = str(folder / "artifact")
    return found


def test_pop_generate_shows_videos_after_images(artifacts, folder, capsys, frames_decoder):
    command = ["--artifact", artifacts["qwen3_vl"], "--prompt", "w5 w6", "--max_new_tokens", "6"]
    shown = ["--video", str(folder / "clip.mp4"), "--image", str(folder / "0.png")]
    assert generate.main([*command, *shown]) == 0
    printed = capsys.readouterr().out.strip()
    made, generator = processor("qwen3_vl"), StageAwareGenerator.from_artifact(artifacts["qwen3_vl"])
    held = np.load(folder / "clip.mp4")["frames"][[0, 2, 4]]  # of 7 at 4 a second, 2 a second from the first on
    inputs = made(
        text=[f"w1 {PLACEHOLDER['qwen3_vl']} {VIDEO_PLACEHOLDER} w5 w6 w2"],
        images=[[Image.open(folder / "0.png").convert("RGB")]],
        videos=[held],
        videos_kwargs={
            "do_sample_frames": False,
            "video_metadata": [VideoMetadata(7, fps=4.0, frames_indices=[0, 2, 4])],
        },
        return_tensors="pt",
        add_special_tokens=False,
    )
    tokens = generator.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert printed == generator.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    again = stream(generator, "w5 w6", images=[folder / "0.png"], videos=[folder / "clip.mp4"], max_new_tokens=6)
    assert "".join(piece for piece, _ in again).strip() == printed


def test_pop_generate_refuses_a_video_that_does_not_fit_in_one_sentence(
    artifacts, folder, tmp_path, capsys, frames_decoder
):
    (tmp_path / "text.mp4").write_text("no video")
    good = str(folder / "clip.mp4")
    rows = write(tmp_path / "rows.jsonl", [chat(clip("none.mp4"))])
    qwen = ["--artifact", artifacts["qwen3_vl"]]
    asked = [*qwen, "--prompt", "w1"]
    cases = [
        ([*asked, "--video", "none.mp4"], "--video 1: the file 'none.mp4' does not exist"),
        ([*asked, "--video", str(tmp_path / "text.mp4")], "--video 1 is damaged or not a video"),
        ([*asked, "--video", "https://example.org/a.mp4"], "set --allow_urls or give"),
        (["--artifact", artifacts["gemma3"], "--prompt", "w1", "--video", good], "--video was given, but the model "),
        ([*qwen, "--data", str(rows), "--output", "o", "--video", good], "--video (belongs to pop-generate prompt)"),
        (["--benchmark", *qwen, "--video", good], "--video (belongs to pop-generate prompt)"),
        ([*qwen, "--data", str(rows), "--output", str(tmp_path / "o")], "rows.jsonl line 1, video 1: the file"),
    ]  # fmt: skip
    for command, expected in cases:
        assert generate.main(command) == 2, command
        message = capsys.readouterr().err
        assert expected in message, (command, message)
        assert "Traceback" not in message
