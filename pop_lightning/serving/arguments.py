"""From an artifact to the arguments of an engine, and what is refused before the engine starts.

The plan travels in vLLM's ``hf_overrides``, which reach every process of an engine: ``architectures`` names the pruned
model class, ``pop`` the artifact and its plan. Nothing here imports vLLM.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from pop_lightning.core.bundled import resolve_bundled
from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.generation.artifact import Artifact, read_artifact
from pop_lightning.generation.hub import fetch

PREFIX = "Pop"  # of a pruned model's architecture: PopLlamaForCausalLM
# Speculation that proposes tokens without a model of its own, so that nothing needs hidden states of the context.
DRAFTS = ("ngram", "ngram_gpu", "suffix")


def engine_args(
    artifact: str | Path,
    base: str | None = None,
    *,
    artifact_revision: str | None = None,
    hf_overrides: dict[str, Any] | None = None,
    **options,
) -> dict[str, Any]:
    """The arguments with which vLLM serves an artifact: ``vllm.LLM(**engine_args("runs/llama/artifact"))``.

    Args:
        artifact: folder that ``pop-fit`` wrote, or a repository of the hub such as ``user/llama-pop``.
        base: hub id or folder of the base model; as the artifact says unless given.
        artifact_revision: branch, tag or commit of the artifact's repository; ``revision`` is the base's.
        hf_overrides: further overrides of the model's configuration.
        options: any other argument of vLLM.

    Raises:
        InputError: the artifact is damaged, its plan cannot be served, or the base is not the one it was made for.
    """
    found = read_artifact(fetch(artifact, artifact_revision))
    identity = found.config["base"]
    revision = options.pop("revision", None) or (identity.get("revision") if base is None else None)
    base = resolve_bundled(identity["id"] if base is None else str(base))
    architecture = check_base_config(found, base, revision, options.get("trust_remote_code", False))
    check_plan(found)
    plan = {"depth": found.plan.depth} | found.plan.kept.to_dict()
    own = {
        "architectures": [f"{PREFIX}{architecture}"],
        "pop": {"artifact": str(found.folder.resolve()), "plan": plan},
    }
    return {
        "model": base,
        **({} if revision is None else {"revision": revision}),
        "hf_overrides": (hf_overrides or {}) | own,
        **options,
    }


def check_plan(artifact: Artifact) -> None:
    """Refuse a plan that the engine cannot run.

    Raises:
        InputError: with the recipe key that fits a plan it can run.
    """
    plan, layers = artifact.plan, artifact.config["base"].get("layers")
    if plan.salient:
        raise InputError(
            f"{artifact.folder} runs salient context tokens in full (salient: {plan.salient}), which is not served "
            "yet: fit without them (salient: 0, or budget.salient: 0 where salient is auto)."
        )
    if not plan.boundary:
        raise InputError(
            f"{artifact.folder} has boundary 0, the ablation without boundary handling, which is not served: fit with "
            "a boundary of at least 1 (boundary: 1)."
        )
    if layers is not None and plan.depth >= layers:
        raise InputError(f"{artifact.folder} prunes nothing (depth {plan.depth} of {layers} layers): serve its base.")


def check_base_config(artifact: Artifact, base: str, revision: str | None, trust_remote_code: bool) -> str:
    """Compare the base's configuration with the artifact's; weights are compared while they are loaded.

    Returns:
        The base's architecture, as vLLM knows it.

    Raises:
        InputError: the configuration cannot be read, is another one, or is that of a multimodal model.
    """
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"no configuration of the base {base} can be read (--base): {reason}.") from error
    architecture = (config.architectures or [artifact.config["base"]["class"]])[0]
    artifact.check_config(config, architecture, base)
    if config.get_text_config() is not config:
        raise InputError(f"{architecture} has images as input, which is not served yet: fit on its text model.")
    return architecture


def plan_of(vllm_config: Any) -> PruningPlan | None:
    """The plan that an engine's configuration carries, or None for an ordinary model."""
    overrides = getattr(getattr(vllm_config.model_config, "hf_config", None), "pop", None)
    return None if overrides is None else PruningPlan(**overrides["plan"])


def check_config(config: Any) -> None:
    """Refuse a ``VllmConfig`` with features that do not work with the pruned prefill.

    Raises:
        InputError: naming the first one.
    """
    for applies, sentence in _refusals(config):
        if applies:
            raise InputError(f"the pruned prefill does not work with {sentence}.")


def _refusals(config: Any) -> list[tuple[bool, str]]:
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    drafts = config.speculative_config
    return [
        (parallel.pipeline_parallel_size > 1, "--pipeline-parallel-size: use --tensor-parallel-size"),
        (parallel.data_parallel_size > 1, "--data-parallel-size: start one server for each replica"),
        (
            parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1,
            "--prefill-context-parallel-size and --decode-context-parallel-size: use --tensor-parallel-size",
        ),
        (parallel.enable_expert_parallel, "--enable-expert-parallel: leave it out"),
        (parallel.use_ubatching, "--enable-dbo and --ubatch-size, which split a step: leave them out"),
        (config.lora_config is not None, "--enable-lora: merge the adapter into the base and fit on the result"),
        (
            drafts is not None and drafts.method not in DRAFTS,
            f"--speculative-config with {getattr(drafts, 'method', None)}, which needs hidden states of the context or "
            f"a second model: expected one of {', '.join(DRAFTS)}",
        ),
        (
            config.kv_transfer_config is not None or config.ec_transfer_config is not None,
            "--kv-transfer-config and --ec-transfer-config, since another engine's blocks may not be pruned: leave "
            "them out",
        ),
        (cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill: leave it out"),
        (
            config.attention_config.hisparse_config is not None,
            "a HiSparse cache: leave hisparse_config out of --attention-config",
        ),
        (
            config.load_config.load_format == "dummy",
            "--load-format dummy, which loads no base to project with: leave it out",
        ),
        (model.runner_type != "generate", f"--runner {model.runner_type}: it generates only"),
        (model.is_multimodal_model, "a model with images as input"),
        (model.uses_mrope, "positions of several dimensions (M-RoPE)"),
        (model.enable_prompt_embeds, "--enable-prompt-embeds: leave it out"),
        (
            config.compilation_config.mode is not None and config.compilation_config.mode.name == "STOCK_TORCH_COMPILE",
            "the compilation mode STOCK_TORCH_COMPILE, which compiles a whole step: choose another one",
        ),
    ]
