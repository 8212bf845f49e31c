"""Tiny random models that read images and videos, prompts with some, the slow plain references, bases in folders."""

import json
import random
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    BatchFeature,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.processing_utils import VideosKwargs
from transformers.video_utils import default_sample_indices_fn

from tests.helpers.families import COMMON, SLIDING, WINDOW

# The last words of the vocabulary: the start of an image, its placeholder, its end, and the placeholder of a video.
OPEN, IMAGE, CLOSE, VIDEO = 93, 94, 95, 96
WORDS = OPEN  # token ids below are text
DEEPSTACK = 2
LAYERS = {"gemma3": 4, "qwen3_vl": 5}


def gemma3():
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**COMMON, "sliding_window": WINDOW, "layer_types": SLIDING},
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            boi_token_index=OPEN,
            image_token_index=IMAGE,
            eoi_token_index=CLOSE,
        )
    )


def qwen3_vl():
    vision = {"hidden_size": 16, "intermediate_size": 24, "depth": 3, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={**COMMON, "num_hidden_layers": LAYERS["qwen3_vl"], "rope_parameters": rope},
            vision_config={**vision, "deepstack_visual_indexes": list(range(DEEPSTACK))},
            vision_start_token_id=OPEN,
            image_token_id=IMAGE,
            vision_end_token_id=CLOSE,
            video_token_id=VIDEO,
        )
    )


FAMILIES = {"gemma3": gemma3, "qwen3_vl": qwen3_vl}


def build(family, attention="sdpa", dtype=torch.float32, seed=0):
    """A random model whose norms and biases are not at their neutral start, so that a forgotten one shows."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 0.0 if family == "gemma3" or "bias" in name else 1.0, 0.2)
        elif parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    model.set_attn_implementation(attention)
    return model.to(dtype).eval().requires_grad_(False)


# --- prompts --------------------------------------------------------------------------------------------------------
# A prompt is a list: a number is so many words of text, a pair an image of so many patches (height, width; Gemma
# resizes all images to one size), a triple a video of so many frames. Every image is opened and closed by a token.


def prompts(family, rows, seed=0):
    """Left-padded prompts as a batch of ``data.collate`` has them; ``vision`` is empty where no row has an image."""
    generator = torch.Generator().manual_seed(seed)
    ids, pixels = [], {"image": [], "video": []}
    grids = {"image": [], "video": []}
    for row in rows:
        ids.append([])
        for part in row:
            if isinstance(part, int):
                ids[-1] += torch.randint(3, WORDS, (part,), generator=generator).tolist()
            elif family == "gemma3":
                ids[-1] += [OPEN, *[IMAGE] * 4, CLOSE]
                pixels["image"].append(torch.randn(1, 3, 28, 28, generator=generator))
            else:
                kind, (frames, height, width) = ("image", (1, *part)) if len(part) == 2 else ("video", part)
                for _ in range(frames):
                    ids[-1] += [OPEN, *[IMAGE if kind == "image" else VIDEO] * (height * width // 4), CLOSE]
                pixels[kind].append(torch.randn(frames * height * width, 3 * 2 * 4 * 4, generator=generator))
                grids[kind].append([frames, height, width])
    vision = {}
    for kind, name, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if pixels[kind]:
            vision[name] = torch.cat(pixels[kind])
        if grids[kind]:
            vision[grid] = torch.tensor(grids[kind])
    width = max(map(len, ids))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    return {"input_ids": padded, "attention_mask": mask, "prompt_length": width, "vision": vision}


def with_response(batch, length=6, seed=1):
    """The batch with a response of ``length`` words after every prompt."""
    shape = (len(batch["input_ids"]), length)
    response = torch.randint(3, WORDS, shape, generator=torch.Generator().manual_seed(seed))
    ids, mask = (
        torch.cat([batch[name], new], 1)
        for name, new in (("input_ids", response), ("attention_mask", torch.ones_like(response)))
    )
    return batch | {"input_ids": ids, "attention_mask": mask, "row_seed": torch.arange(shape[0])}


def types(ids):
    return (ids == IMAGE).long() + 2 * (ids == VIDEO).long()


def positions(model, batch):
    """Every token's position, from the model's own functions."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    text = (mask.cumsum(-1) - 1).clamp(min=0)
    if "Qwen" not in type(model).__name__:
        return text
    grids = {name: grid for name, grid in batch["vision"].items() if "grid" in name}
    if not grids:
        return text.expand(4, -1, -1)
    rotary, _ = model.model.get_rope_index(ids, mm_token_type_ids=types(ids), attention_mask=mask, **grids)
    return torch.cat([text[None], rotary])


def images(family, batch):
    """The vision arguments of the model's forward and of ``generate``."""
    if not batch["vision"]:
        return {}
    return batch["vision"] | {("mm_" if family == "qwen3_vl" else "") + "token_type_ids": types(batch["input_ids"])}


# --- the references -------------------------------------------------------------------------------------------------


def family_of(model):
    return "qwen3_vl" if "Qwen" in type(model).__name__ else "gemma3"


def own_kv(model, layer, hidden, position_ids):
    """A layer's keys and values for its input ``hidden``, written as the model's own forward writes them."""
    block = model.model.language_model.layers[layer]
    normed = block.input_layernorm(hidden)
    return to_heads(model, layer, block.self_attn.k_proj(normed), block.self_attn.v_proj(normed), position_ids)


def to_heads(model, layer, keys, values, position_ids):
    body = model.model.language_model
    attention = body.layers[layer].self_attn
    keys, values = (x.unflatten(-1, (-1, attention.head_dim)) for x in (keys, values))
    keys, values = attention.k_norm(keys).transpose(1, 2), values.transpose(1, 2)
    if family_of(model) == "qwen3_vl":
        cos, sin = body.rotary_emb(keys, position_ids[1:])
        _, keys = modeling_qwen3_vl.apply_rotary_pos_emb(keys, keys, cos, sin)
    else:
        cos, sin = body.rotary_emb(keys, position_ids, body.config.layer_types[layer])
        _, keys = modeling_gemma3.apply_rotary_pos_emb(keys, keys, cos, sin)
    return keys, values


def mapped(model, maps, layer, hidden):
    """``[k|v] = W' n(h_d) + b'`` of a fitted layer, before k_norm and RoPE."""
    weight, bias = (tensor.to(hidden) for tensor in maps[layer])
    h = hidden.float()
    eps = model.model.language_model.config.rms_norm_eps
    normed = h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return (normed.to(hidden.dtype) @ weight.T + bias).chunk(2, dim=-1)


def context_pass(model, batch, depth, context, maps=()):
    """The first of two plain passes: only the context with its images, then its keys and values above ``depth``
    replaced. Returns the context's h_d and the cache."""
    body, place = model.model.language_model, positions(model, batch)[..., :context]
    head = batch | {name: batch[name][:, :context] for name in ("input_ids", "attention_mask")}
    with recorded(body.layers[depth]) as seen:
        cache = model(
            input_ids=head["input_ids"],
            attention_mask=head["attention_mask"],
            position_ids=place,
            use_cache=True,
            **images(family_of(model), head),
        ).past_key_values
    for layer in range(depth, len(body.layers)):
        if layer in maps:
            new = to_heads(model, layer, *mapped(model, maps, layer, seen[0]), place)
        else:
            new = own_kv(model, layer, seen[0], place)
        for name, tensor in zip(("keys", "values"), new, strict=True):
            held = getattr(cache.layers[layer], name).shape[-2]  # a sliding layer keeps the last ones
            setattr(cache.layers[layer], name, tensor[:, :, -held:])
    return seen[0], cache


def two_pass(model, batch, depth, boundary, maps=()):
    """The pruned prefill in two plain passes: :func:`context_pass`, then the boundary tokens, which are text.

    Returns the last token's logits and the cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    context, place = max(0, ids.shape[1] - boundary), positions(model, batch)
    body = model.model.language_model
    if not context or depth == len(body.layers):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=place, use_cache=True, **images(family_of(model), batch)
        )
        return output.logits[:, -1:], output.past_key_values
    hidden, cache = context_pass(model, batch, depth, context, maps)
    if boundary == 0:
        return model.lm_head(body.norm(hidden[:, -1:])), cache
    second = model(
        input_ids=ids[:, context:],
        attention_mask=mask,
        position_ids=place[..., context:],
        past_key_values=cache,
        use_cache=True,
    )
    return second.logits[:, -1:], second.past_key_values


def substituted(model, batch, depth, boundary, maps=(), selected=None):
    """One plain pass over prompt and response, wherever the images are, in which the pruned layers' k_proj and v_proj
    give the context's tokens what h_d projects to. Nothing else of the context is read above the depth, so the logits
    at boundary and response tokens are the pruned model's: ``[batch, tokens, vocabulary]``. Context tokens that are
    ``selected`` ``[batch, salient]`` keep their own."""
    body = model.model.language_model
    context = max(0, batch["prompt_length"] - boundary)
    handles = []
    projected = torch.ones(len(batch["input_ids"]), context, 1, dtype=torch.bool)
    if selected is not None:
        projected.scatter_(1, selected[..., None], False)

    def replace(layer, half):
        def hook(module, args, output):
            h = seen[0][:, :context]
            if layer in maps:
                new = mapped(model, maps, layer, h)[half]
            else:
                new = module.forward(body.layers[layer].input_layernorm(h))
            return torch.cat([torch.where(projected, new, output[:, :context]), output[:, context:]], 1)

        return hook

    with recorded(body.layers[depth]) as seen:
        for layer in range(depth, len(body.layers)):
            attention = body.layers[layer].self_attn
            handles.append(attention.k_proj.register_forward_hook(replace(layer, 0)))
            handles.append(attention.v_proj.register_forward_hook(replace(layer, 1)))
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=positions(model, batch),
            use_cache=False,
            **images(family_of(model), batch),
        ).logits
    for handle in handles:
        handle.remove()
    if boundary == 0:  # the last prompt token is context itself: its h_d goes to the head
        last = model.lm_head(body.norm(seen[0][:, context - 1 : context]))
        logits = torch.cat([logits[:, : context - 1], last, logits[:, context:]], 1)
    return logits


@contextmanager
def recorded(layer):
    """The inputs that a layer was given while the model ran."""
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def greedy(model, logits, cache, batch, steps):
    """Greedy continuation from a prefilled cache, one plain forward per token; ``[batch, steps]``."""
    mask, last, tokens = batch["attention_mask"], positions(model, batch)[..., -1:], []
    if last.dim() == 3:  # text goes on after the largest position of the prompt
        rotary = positions(model, batch)[1:].amax((0, 2))
        last = torch.stack([last[0], *[rotary[:, None]] * 3])
    for _ in range(steps):
        token = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
        mask, last = torch.cat([mask, torch.ones_like(token)], dim=1), last + 1
        output = model(input_ids=token, attention_mask=mask, position_ids=last, past_key_values=cache, use_cache=True)
        logits, cache = output.logits, output.past_key_values
    return torch.cat(tokens, dim=1)


# --- a base in a folder ---------------------------------------------------------------------------------------------

SPECIAL = {
    "gemma3": ["<start_of_image>", "<image_soft_token>", "<end_of_image>", "<unused>"],
    "qwen3_vl": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"],
}
PLACEHOLDER = {"gemma3": "<start_of_image>", "qwen3_vl": "<|vision_start|> <|image_pad|> <|vision_end|>"}
VIDEO_PLACEHOLDER = "<|vision_start|> <|video_pad|> <|vision_end|>"
TIMES = [
    "<0.0",
    "<0.2",
    "<0.5",
    "<1.0",
    "<2.0",
    "seconds>",
]  # the last words of text: all other times are unknown words


class SmallVideoProcessor:
    """What Qwen3-VL's own, which needs torchvision, yields of frames whose sides are multiples of 8; others are cut."""

    patch_size, temporal_patch_size, merge_size = 4, 2, 2
    do_sample_frames, fps, num_frames = True, 2, None
    valid_kwargs = VideosKwargs

    def sample_frames(self, metadata, num_frames=None, fps=None, **settings):
        return default_sample_indices_fn(metadata, num_frames, fps)

    def __call__(self, videos, video_metadata, do_sample_frames, **settings):
        assert not do_sample_frames  # files are sampled when they are read
        patches, grids = [], []
        for frames in videos:
            frames = torch.as_tensor(np.asarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
            if frames.shape[0] % 2:
                frames = torch.cat([frames, frames[-1:]])
            height, width = (side // 8 * 2 for side in frames.shape[2:])
            frames = frames[:, :, : 4 * height, : 4 * width]
            if not frames.numel():
                raise ValueError(f"frames of {frames.shape[2]}x{frames.shape[3]} are too small")
            parts = frames.reshape(-1, 2, 3, height // 2, 2, 4, width // 2, 2, 4)
            grids.append([len(parts), height, width])
            patches.append(parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * 2 * 4 * 4))
        found = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
        return BatchFeature(found | {"video_metadata": video_metadata})


class SmallQwen3VLProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor with the small part for videos."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = SPECIAL["qwen3_vl"][1], SPECIAL["qwen3_vl"][3]
        self.image_token_id, self.video_token_id = IMAGE, VIDEO
        self.vision_start_token, self.vision_end_token = SPECIAL["qwen3_vl"][0], SPECIAL["qwen3_vl"][2]
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @property
    def video_processor(self):
        return SmallVideoProcessor()


class SmallQwen3VLConfig(Qwen3VLConfig):
    """A key to register the processor under; AutoProcessor finds it by its name in the saved folder."""


AutoProcessor.register(SmallQwen3VLConfig, SmallQwen3VLProcessor)


def template(family):
    """A chat template with parts for images and videos, as the real ones have them."""
    return (
        "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}"
        "{% if m.content is string %}{{ m.content }} {% else %}{% for p in m.content %}"
        "{{ '" + PLACEHOLDER[family] + " ' if p.type == 'image' else '" + VIDEO_PLACEHOLDER + " ' if p.type == 'video'"
        " else p.text + ' ' }}{% endfor %}{% endif %}"
        "{{ '<eos> ' if m.role == 'assistant' else '' }}{% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
    )


def processor(family):
    text = [f"w{i}" for i in range(WORDS - 4 - len(TIMES))] + TIMES
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *text, *SPECIAL[family]]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    extra = {"boi_token": words[OPEN], "image_token": words[IMAGE], "eoi_token": words[CLOSE]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[family],
        chat_template=template(family),
        **({"extra_special_tokens": extra} if family == "gemma3" else {}),
    )
    if family == "gemma3":
        pixels = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
        return Gemma3Processor(pixels, tokenizer, chat_template=template(family), image_seq_length=4)
    pixels = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=512)
    return SmallQwen3VLProcessor(pixels, tokenizer, chat_template=template(family))


def save_base(folder, family, model=None):
    (build(family) if model is None else model).save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder


def save_pictures(folder, count=6, seed=0):
    """Small pictures of several sizes; their file names."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        height, width = (int(torch.randint(9, 30, (1,), generator=generator)) for _ in range(2))
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        names.append(f"{number}.png")
        Image.fromarray(pixels.numpy()).save(folder / names[-1])
    return names


def save_frames(folder, count=8, seed=0, size=(16, 24)):
    """Frames of one size; their file names."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"frame{number}.png" for number in range(count)]
    for name in names:
        pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    return names


def save_rows(path, rows=60, seed=0, videos=False):
    """Chats, every third one without images, the others with one or two images (``pictures/``) in their first turn.

    With ``videos`` every fifth chat shows one besides, of two to four frames."""
    names = save_pictures(path.parent / "pictures", seed=seed)
    frames = save_frames(path.parent / "pictures", seed=seed) if videos else []
    rng = random.Random(seed)
    lines = []
    for number in range(rows):
        said = [" ".join(f"w{rng.randrange(3, 80)}" for _ in range(rng.randint(2, 12))) for _ in range(2)]
        parts = [{"type": "image", "path": f"pictures/{rng.choice(names)}"} for _ in range(number % 3)]
        if videos and number % 5 == 0:
            shown = [f"pictures/{name}" for name in rng.sample(frames, rng.randint(2, 4))]
            parts.insert(rng.randint(0, len(parts)), {"type": "video", "video": shown, "fps": 2})
        parts.insert(rng.randint(0, len(parts)), {"type": "text", "text": said[0]})
        answer = " ".join(f"w{rng.randrange(3, 80)}" for _ in range(rng.randint(1, 4)))
        messages = [{"role": "user", "content": parts if len(parts) > 1 else said[0]}]
        if number % 4 == 1:  # two turns, the images in the first
            messages += [{"role": "assistant", "content": said[1]}, {"role": "user", "content": said[0]}]
        lines.append(json.dumps({"messages": [*messages, {"role": "assistant", "content": answer}]}))
    path.write_text("\n".join(lines) + "\n")
    return path
