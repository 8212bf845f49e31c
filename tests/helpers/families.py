"""Tiny random models of the real classes, and the slow plain reference that the fast paths are compared with."""

import importlib
from contextlib import contextmanager

import pytest
import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Exaone4Config,
    Exaone4ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from pop_lightning.models.names import CACHE

WINDOW = 8
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADLESS = {key: value for key, value in COMMON.items() if key != "head_dim"}  # these derive the width of a head
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA4 = {"sliding_window": WINDOW, "layer_types": SLIDING, "global_head_dim": 16, "num_global_key_value_heads": 1,
          "attention_k_eq_v": True}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**COMMON, sliding_window=WINDOW, layer_types=SLIDING)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **EXPERTS, num_experts=4, mlp_only_layers=[1])),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**COMMON, sliding_window=WINDOW, rope_parameters=PARTIAL)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**COMMON, no_rope_layers=[1, 0, 1, 0])),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**COMMON, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    ),
    # Global layers with heads of another width and number, values made by k_proj, and an input of its own per layer.
    "gemma4": lambda: Gemma4ForCausalLM(
        Gemma4TextConfig(
            **COMMON, **GEMMA4, hidden_size_per_layer_input=16, vocab_size_per_layer_input=COMMON["vocab_size"]
        )
    ),
    # The same with experts next to the feed-forward branch of every layer, and without inputs per layer (26B-A4B).
    "gemma4_moe": lambda: Gemma4ForCausalLM(
        Gemma4TextConfig(
            **COMMON, **GEMMA4, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=4, top_k_experts=2,
            moe_intermediate_size=24,
        )
    ),
    # Chunks of WINDOW tokens; the layers without RoPE see everything and sharpen their attention from 5 tokens on.
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **COMMON, attention_chunk_size=WINDOW, no_rope_layers=[1, 0, 1, 0], intermediate_size_mlp=64, floor_scale=5,
            interleave_moe_layer_step=2, num_local_experts=3,
        )
    ),
    # Attention sinks, biases everywhere, and rotary tables of half a head's width.
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**COMMON, sliding_window=WINDOW, layer_types=SLIDING, num_experts_per_tok=2, num_local_experts=4)
    ),
    # Norms after the branches alone, so that keys are made of the residual stream itself, and one norm over all heads.
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**HEADLESS)),
    "olmo3": lambda: Olmo3ForCausalLM(Olmo3Config(**HEADLESS, sliding_window=WINDOW, layer_types=SLIDING)),
    # The same with a norm for each head; the global layers have no RoPE.
    "exaone4": lambda: Exaone4ForCausalLM(Exaone4Config(**COMMON, sliding_window=WINDOW, layer_types=SLIDING)),
    # Attention and feed-forward branch of one centered norm, pairwise RoPE in sliding layers only, scaled logits.
    "cohere2": lambda: Cohere2ForCausalLM(
        Cohere2Config(**COMMON, sliding_window=WINDOW, layer_types=SLIDING, logit_scale=0.25)
    ),
    "nemotron": lambda: NemotronForCausalLM(NemotronConfig(**COMMON, rope_parameters=PARTIAL)),
    # An input norm, and one norm over the keys of all heads.
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**HEADLESS, num_experts=4, num_experts_per_tok=2)),
}  # fmt: skip
# `make test` runs these through everything; of the others it runs the exactness matrix's pairs and a few more.
QUICK = ("llama", "mistral", "qwen2", "qwen3", "gemma3")


def marked(families, quick=QUICK):
    """``families`` for ``parametrize``, those that are not quick under the mark ``full``."""
    return [family if family in quick else pytest.param(family, marks=pytest.mark.full) for family in families]


EVERY = marked(FAMILIES)
POST_NORM = ("olmo2", "olmo3", "exaone4")


# Transformers refuses sdpa where it cannot compute the scores: soft-capped (Gemma 2), with sinks (gpt-oss).
ATTENTIONS = {family: ("eager",) if family in ("gemma2", "gpt_oss") else ("sdpa", "eager") for family in FAMILIES}
MATRIX = [(family, attention) for family in FAMILIES for attention in ATTENTIONS[family]]


def build(family, attention=None, dtype=torch.float32, seed=0):
    """A random model whose norms and biases are not at their neutral start, so that a forgotten one shows."""
    torch.manual_seed(seed)
    model = randomize(FAMILIES[family](), family)
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation(attention or ATTENTIONS[family][0])
    if family in ("qwen3_moe", "gemma4_moe", "gpt_oss", "olmoe") and (attention == "eager" or dtype == torch.float64):
        model.set_experts_implementation("eager")  # grouped products know neither float64 nor PyTorch's counter
    return model.to(dtype).eval().requires_grad_(False)


def randomize(model, family):
    """Draw all weights of a model of ``family`` from torch's generator, norms and biases too; returns it."""
    neutral = 0.0 if family in ("gemma2", "gemma3", "nemotron") else 1.0  # these add one to a norm's weight
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 0.0 if "bias" in name else neutral, 0.2)
        elif parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
        if family in ("gemma4", "gemma4_moe") and "k_norm" in name:
            parameter.data.mul_(0.25)  # its scores are not scaled: the norms learn it, or attention is all or nothing
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.8)
    return model.eval().requires_grad_(False)


def take_all_experts(model):
    """Every token goes to every expert: for comparisons in half precision, where a near tie between two of them falls
    one way in one computation and the other way in the other, which no bound on rounding covers."""
    for module in model.modules():
        if hasattr(module, "top_k") and hasattr(module, "num_experts"):
            module.top_k = module.num_experts
    if hasattr(model.config, "top_k_experts"):  # Gemma 4's router reads it there at each call
        model.config.top_k_experts = model.config.num_experts
    return model


def ragged(lengths, seed=0):
    """Left-padded random prompts: ids and mask, ``[batch, longest]``."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, COMMON["vocab_size"], (len(lengths), width), generator=generator)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return ids * mask, mask


def own_kv(model, layer, hidden, position_ids):
    """A layer's keys and values for its input ``hidden``, written as the model's own forward writes them."""
    block = model.model.layers[layer]
    attention = block.self_attn
    normed = hidden if model.config.model_type in POST_NORM else block.input_layernorm(hidden)
    if model.config.model_type == "phi3":
        qkv = attention.qkv_proj(normed)
        kv_dim = model.config.num_key_value_heads * attention.head_dim
        keys, values = qkv[..., -2 * kv_dim : -kv_dim], qkv[..., -kv_dim:]
    elif model.config.model_type == "gemma4_text" and attention.v_proj is None:
        keys = values = attention.k_proj(normed)
    else:
        keys, values = attention.k_proj(normed), attention.v_proj(normed)
    return to_heads(model, layer, keys, values, position_ids)


def to_heads(model, layer, keys, values, position_ids):
    """``[batch, tokens, kv_dim]`` to cacheable ``[batch, heads, tokens, head_dim]``: key and value norms, and RoPE."""
    attention, kind = model.model.layers[layer].self_attn, model.config.model_type
    module, rotary = importlib.import_module(type(model).__module__), model.model.rotary_emb
    shape = (*keys.shape[:-1], -1, attention.head_dim)
    heads_together = kind in ("olmo2", "olmo3", "olmoe")
    if heads_together:
        keys = attention.k_norm(keys)
    keys, values = keys.reshape(shape), values.reshape(shape)
    if kind == "llama4_text":
        if model.config.no_rope_layers[layer]:
            _, keys = module.apply_rotary_emb(keys, keys, rotary(keys, position_ids))
            keys = attention.qk_norm(keys)
        return keys.transpose(1, 2), values.transpose(1, 2)
    if hasattr(attention, "k_norm") and not heads_together:
        keys = attention.k_norm(keys)
    if hasattr(attention, "v_norm"):
        values = attention.v_norm(values)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if kind in ("gemma3_text", "gemma4_text", "olmo3"):
        cos, sin = rotary(keys, position_ids, model.config.layer_types[layer])
    else:
        cos, sin = rotary(keys, position_ids)
    if kind == "gemma4_text":
        return module.apply_rotary_pos_emb(keys, cos, sin), values
    if kind == "smollm3" and not model.config.no_rope_layers[layer]:
        return keys, values
    if kind in ("exaone4", "cohere2") and model.config.layer_types[layer] == "full_attention":
        return keys, values
    return module.apply_rotary_pos_emb(keys, keys, cos, sin)[1], values


def random_maps(depth, seed=0, model=None):
    """Fitted projections ``{layer: (W' [2 kv_dim, hidden], b')}`` of a model (of COMMON's shape), at random."""
    generator = torch.Generator().manual_seed(seed)
    heights = dict.fromkeys(range(COMMON["num_hidden_layers"]), 2 * COMMON["num_key_value_heads"] * COMMON["head_dim"])
    if model is not None and model.config.model_type == "gemma4_text":
        heights |= {layer: 2 * 1 * 16 for layer, kind in enumerate(SLIDING) if kind == "full_attention"}
    return {
        layer: (
            0.2 * torch.randn(heights[layer], COMMON["hidden_size"], generator=generator),
            0.2 * torch.randn(heights[layer], generator=generator),
        )
        for layer in range(depth + 1, COMMON["num_hidden_layers"])
    }


def norm_eps(model):
    return next(
        eps for name in ("rms_norm_eps", "layer_norm_eps", "norm_eps") if (eps := getattr(model.config, name, 0))
    )


def mapped_kv(model, maps):
    """``project`` for :func:`two_pass`: fitted layers through their map of n(h), the others through their own."""

    def project(layer, hidden, position_ids):
        if layer not in maps:
            return own_kv(model, layer, hidden, position_ids)
        weight, bias = (tensor.to(hidden) for tensor in maps[layer])
        kind, normed = model.config.model_type, hidden.float()
        if kind in ("cohere2", "nemotron"):
            normed = torch.nn.functional.layer_norm(normed, normed.shape[-1:], eps=norm_eps(model))
        elif kind not in POST_NORM:
            normed = normed / (normed.pow(2).mean(-1, keepdim=True) + norm_eps(model)).sqrt()
        kv = normed.to(hidden.dtype) @ weight.T + bias
        keys, values = kv.chunk(2, dim=-1)
        return to_heads(model, layer, keys, values, position_ids)

    return project


def context_pass(model, ids, mask, depth, context, project=None, cache=None):
    """The first of two plain passes: only the context, then its keys and values above ``depth`` replaced.

    ``project(layer, h_d, position_ids)`` gives a pruned layer's keys and values; its own (reuse) unless given. With
    ``cache``, the tokens that it holds are left as they are and the pass runs over what follows them. Returns the
    context's h_d (of the tokens that ran) and the cache.
    """
    project = project or (lambda layer, hidden, positions: own_kv(model, layer, hidden, positions))
    past = 0 if cache is None else int(cache.get_seq_length())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:context]
    output = model(
        input_ids=ids[:, past:context],
        attention_mask=mask[:, :context],
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=True,
    )
    hidden, cache = output.hidden_states[depth], output.past_key_values
    for layer in range(depth, model.config.num_hidden_layers):
        new = project(layer, hidden, positions)
        for name, tensor in zip(("keys", "values"), new, strict=True):
            held = getattr(cache.layers[layer], name)
            count = min(held.shape[-2], context - past)
            tensor = torch.cat([held[:, :, : held.shape[-2] - count], tensor[:, :, -count:]], dim=2)
            setattr(cache.layers[layer], name, tensor)
    return hidden, cache


def two_pass(model, ids, mask, depth, boundary, project=None):
    """The pruned prefill in two plain passes: :func:`context_pass`, then the boundary tokens in full.

    Returns the last token's logits and the cache.
    """
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    context = max(0, ids.shape[1] - boundary)
    if context == 0 or depth == model.config.num_hidden_layers:
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        return output.logits[:, -1:], output.past_key_values
    hidden, cache = context_pass(model, ids, mask, depth, context, project)
    if boundary == 0:
        logits = model.lm_head(model.model.norm(hidden[:, -1:]))
        logits = logits * getattr(model.config, "logit_scale", 1.0)
        cap = getattr(model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap), cache
    second = model(
        input_ids=ids[:, context:],
        attention_mask=mask,
        position_ids=positions[:, context:],
        past_key_values=cache,
        use_cache=True,
    )
    return second.logits[:, -1:], second.past_key_values


def two_pass_generate(model, ids, mask, depth, boundary, *, project=None, cache=None, **arguments):
    """Any feature of ``generate`` over the pruned prefill: the plain model generates from the context's cache."""
    context = max(0, ids.shape[1] - boundary)
    past = 0 if cache is None else int(cache.get_seq_length())
    if context > past:
        _, cache = context_pass(model, ids, mask, depth, context, project, cache)
    if cache is not None:
        cache.batch_repeat_interleave(max(arguments.get("num_beams", 1), arguments.get("num_return_sequences", 1)))
    return model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **arguments)


@contextmanager
def first_forward_in_two_passes(model, length, depth, boundary, project=None):
    """For decoding that starts with one forward of prompt and candidates: that forward is run in two plain passes."""
    plain = model.forward

    def forward(input_ids, attention_mask=None, position_ids=None, **kwargs):
        past_key_values = kwargs.pop(CACHE, None)
        model.forward = plain
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        context = max(0, length - boundary)
        if context:
            context_pass(model, input_ids, mask, depth, context, project, past_key_values)
        return plain(
            input_ids=input_ids[:, context:],
            attention_mask=attention_mask,
            position_ids=position_ids[:, context:],
            past_key_values=past_key_values,
            **kwargs,
        )

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def greedy(model, logits, cache, mask, steps):
    """Greedy continuation from a prefilled cache, one plain forward per token; ``[batch, steps]``."""
    tokens = []
    for _ in range(steps):
        token = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        positions = (mask.cumsum(-1) - 1)[:, -1:]
        output = model(
            input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        logits, cache = output.logits, output.past_key_values
    return torch.cat(tokens, dim=1)


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
