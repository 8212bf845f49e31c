"""Each family from scoring to generation, and the decoders that are refused, by name and with the reason."""

import lightning
import pytest
import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    OlmoConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.data.batches import collate
from pop_lightning.fitting.regressions import ClosedFormFit, ValueRefit
from pop_lightning.fitting.training import KVProjectionTraining
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.projections import KVProjections

from tests.fitting.test_importance import rows, score
from tests.helpers.families import (
    COMMON,
    FAMILIES,
    HEADLESS,
    SLIDING,
    build,
    greedy,
    mapped_kv,
    marked,
    ragged,
    two_pass,
)

LAYERS = COMMON["num_hidden_layers"]
PER_LAYER = {"vocab_size_per_layer_input": COMMON["vocab_size"], "hidden_size_per_layer_input": 4}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
          "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
          "moe_intermediate_size": 16}  # fmt: skip
NEXT = {"num_experts": 0, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8}  # fmt: skip
NARROW = {"activation_sparsity_pattern": [0.0] * LAYERS, "laurel_rank": 4}


def gemma3n(shared):
    return Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **COMMON | {"intermediate_size": [48] * LAYERS}, **PER_LAYER, **NARROW, layer_types=SLIDING,
            num_kv_shared_layers=shared,
        )
    )  # fmt: skip


def gemma4(shared):
    config = Gemma4TextConfig(**COMMON, **PER_LAYER, layer_types=SLIDING, num_kv_shared_layers=shared)
    return Gemma4ForCausalLM(config)


REFUSED = {
    "Mamba layers, the last among them": (
        lambda: JambaForCausalLM(JambaConfig(**HEADLESS, attn_layer_period=2, attn_layer_offset=0, num_experts=2)),
        r"JambaForCausalLM.*any depth.*layer 3 .*recurrent layer \(mamba\)",
    ),
    "attention and Mamba side by side": (
        lambda: FalconH1ForCausalLM(
            FalconH1Config(**COMMON, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_d_ssm=64)
        ),
        r"FalconH1ForCausalLM.*any depth.*recurrent layer \(mamba\)",
    ),
    "convolutions, the last layer among them": (
        lambda: Lfm2ForCausalLM(Lfm2Config(**HEADLESS, full_attn_idxs=[0])),
        r"Lfm2ForCausalLM.*any depth.*recurrent layer \(conv\)",
    ),
    "shared keys and values, Gemma 3n": (lambda: gemma3n(2), r"Gemma3nForCausalLM.*any depth.*shares the keys"),
    "several residual streams": (lambda: gemma3n(0), r"Gemma3nForCausalLM.*residual streams \(AltUp\)"),
    "shared keys and values, Gemma 4": (lambda: gemma4(2), r"Gemma4ForCausalLM.*any depth.*layer 3.*shares the keys"),
    "MLA, DeepSeek V2": (
        lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**HEADLESS, **LATENT)),
        r"DeepseekV2ForCausalLM.*multi-head latent attention",
    ),
    "MLA, DeepSeek V3": (
        lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**HEADLESS, **LATENT)),
        r"DeepseekV3ForCausalLM.*multi-head latent attention",
    ),
    "an encoder-decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
        ),
        "T5ForConditionalGeneration is an encoder-decoder",
    ),
    "an input norm without weights": (
        lambda: OlmoForCausalLM(OlmoConfig(**HEADLESS)),
        "OlmoForCausalLM.*no weight in its input_layernorm",
    ),
    "clipped keys": (
        lambda: OlmoeForCausalLM(OlmoeConfig(**HEADLESS, num_experts=4, num_experts_per_tok=2, clip_qkv=8.0)),
        r"OlmoeForCausalLM.*clips its keys and values \(clip_qkv\)",
    ),
    "a key norm with weights for each head": (
        lambda: CohereForCausalLM(CohereConfig(**HEADLESS, use_qk_norm=True)),
        r"CohereForCausalLM.*k_norm has a weight for each head \(2 x 8\)",
    ),
    "another build altogether": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)),
        "GPT2LMHeadModel is not supported: no decoder",
    ),
}
HYBRID = {
    "linear attention": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**COMMON, **NEXT)),
    "Mamba": lambda: BambaForCausalLM(
        BambaConfig(
            **HEADLESS, attn_layer_indices=[1, 3], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1
        )
    ),
}


@pytest.mark.parametrize("build_model", REFUSED)
def test_a_decoder_without_keys_and_values_to_project_is_refused_with_the_reason(build_model):
    make, reason = REFUSED[build_model]
    with pytest.raises(InputError, match=reason):
        StageAwareGenerator(make().eval(), PruningPlan(1))


@pytest.mark.parametrize("hybrid", HYBRID)
def test_a_hybrid_is_pruned_above_its_last_recurrent_layer_and_refused_below(hybrid):
    torch.manual_seed(0)
    model = HYBRID[hybrid]().eval()
    decoder = Decoder(model)
    assert (decoder.smallest_depth, set(decoder.parts) & {2}) == (LAYERS - 1, set())
    with pytest.raises(InputError, match=r"depth 2: layer 2 .*recurrent layer.*set the depth to 3 or more \(of 4"):
        StageAwareGenerator(model, PruningPlan(2))
    ids, mask = ragged([19])
    plain = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    ours = StageAwareGenerator(model, PruningPlan(LAYERS - 1)).generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False
    )
    assert torch.equal(ours, plain)


def test_chunked_attention_with_flash_attention_is_refused():
    model = build("llama4")
    model.config._attn_implementation = "flash_attention_2"  # the setter asks for the kernels' package
    with pytest.raises(InputError, match=r"attends in chunks.*attn_implementation='sdpa'"):
        StageAwareGenerator(model, PruningPlan(2))


def test_a_model_that_cannot_run_is_refused_in_one_sentence():
    model = build("llama")
    model.model.layers[2].mlp.up_proj = torch.nn.Linear(3, 3)
    with pytest.raises(InputError, match=r"LlamaForCausalLM is not supported: .*fails with"):
        StageAwareGenerator(model, PruningPlan(2))


@pytest.mark.parametrize("family", marked(FAMILIES, quick=("phi3", "gemma4")))
def test_a_family_is_scored_fitted_trained_and_generates_as_two_passes_do(family):
    model, depth = build(family), 1
    decoder, batch = Decoder(model), collate(rows(6), 0)
    scores = score(model, [batch])
    assert scores.isfinite().all()
    assert (scores[:-1] > 0).all()
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader([batch], batch_size=None)
    fit = ClosedFormFit(decoder, [depth])
    trainer.validate(fit, batches, verbose=False)
    start = fit.solve(depth, 0.1, "attention")
    second = ValueRefit({depth: start})
    trainer.validate(second, batches, verbose=False)
    refitted = second.solve(depth, 0.1)
    training = KVProjectionTraining(refitted.copy())
    before = training.loss(batch)
    before.backward()
    optimizer = torch.optim.SGD([training.parameter_group() | {"lr": 0.01}])
    optimizer.step()
    assert training.loss(batch) < before
    ids, mask = ragged([21, 9])
    for projections in (KVProjections(decoder, depth), refitted, training.trained()):
        maps = {layer: projections.affine(layer) for layer in projections.replaced}
        logits, cache = two_pass(model, ids, mask, depth, 1, mapped_kv(model, maps))
        ours = StageAwareGenerator(model, PruningPlan(depth), projections).generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert torch.equal(ours[:, ids.shape[1] :], greedy(model, logits, cache, mask, 8))
