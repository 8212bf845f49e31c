"""Tiny random models that read images, prompts with images for them, and the slow plain references."""

from contextlib import contextmanager

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.qwen3_vl import modeling_qwen3_vl

from families import COMMON, SLIDING, WINDOW

# The last words of the vocabulary: what opens an image, stands for its features, closes it, and a video's features.
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
    """The batch with a response of ``length`` words behind every prompt."""
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


def two_pass(model, batch, depth, boundary, maps=()):
    """The pruned prefill in two plain passes: the context with its images alone, its keys and values above ``depth``
    replaced; then the boundary tokens, which are text. Returns the last token's logits and the cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    context, place = max(0, ids.shape[1] - boundary), positions(model, batch)
    body = model.model.language_model
    if not context or depth == len(body.layers):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=place, use_cache=True, **images(family_of(model), batch)
        )
        return output.logits[:, -1:], output.past_key_values
    head = batch | {"input_ids": ids[:, :context], "attention_mask": mask[:, :context]}
    with recorded(body.layers[depth]) as seen:
        cache = model(
            input_ids=head["input_ids"],
            attention_mask=head["attention_mask"],
            position_ids=place[..., :context],
            use_cache=True,
            **images(family_of(model), head),
        ).past_key_values
    hidden = seen[0]
    for layer in range(depth, len(body.layers)):
        if layer in maps:
            new = to_heads(model, layer, *mapped(model, maps, layer, hidden), place[..., :context])
        else:
            new = own_kv(model, layer, hidden, place[..., :context])
        for name, tensor in zip(("keys", "values"), new, strict=True):
            held = getattr(cache.layers[layer], name).shape[-2]  # a sliding layer keeps the last ones
            setattr(cache.layers[layer], name, tensor[:, :, -held:])
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


def substituted(model, batch, depth, boundary, maps=()):
    """One plain pass over prompt and response, wherever the images are, in which the pruned layers' k_proj and v_proj
    give the context's tokens what h_d projects to. Nothing else of the context is read above the depth, so the logits
    at boundary and response tokens are the pruned model's: ``[batch, tokens, vocabulary]``."""
    body = model.model.language_model
    context = max(0, batch["prompt_length"] - boundary)
    handles = []

    def replace(layer, half):
        def hook(module, args, output):
            h = seen[0][:, :context]
            if layer in maps:
                new = mapped(model, maps, layer, h)[half]
            else:
                new = module.forward(body.layers[layer].input_layernorm(h))
            return torch.cat([new, output[:, context:]], 1)

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
