"""Attention of the pruned layers: any backend of vLLM, planned for the kept tokens only.

A subclass of the backend that vLLM chose builds its metadata from a ``CommonAttentionMetadata`` of the rows that have
kept tokens. Their keys are those of the whole sequence, context included, so nothing else changes.
"""

import functools
from typing import Any

import torch

from pop_lightning.core.errors import InputError
from pop_lightning.serving import private
from pop_lightning.serving.steps import Step, announced

PREFIX = "Pruned"


@functools.cache
def pruned_backend(backend: type) -> type:
    """``backend`` for pruned layers.

    Raises:
        InputError: the backend writes keys and values inside its kernel, so that those of the context, which has no
            queries here, could not be written.
    """
    if backend.forward_includes_kv_cache_update:
        raise InputError(
            f"the attention backend {backend.get_name()} writes keys and values inside its kernel, which a pruned "
            "prefill cannot use: choose another one with --attention-backend."
        )
    underlying = backend.get_builder_cls()

    class PrunedBuilder(underlying):
        # vLLM would replace the block table of metadata made for another group by one of all rows.
        supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
            """At most graphs of uniform decode batches: a graph of a mixed batch would hold context tokens."""
            support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            return min(support, private.AttentionCGSupport.UNIFORM_BATCH, key=lambda each: each.value)

        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args, **kwargs) -> Any:
            step = announced.pruning
            if step is None:
                return super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            if not len(step.rows):
                return None  # the pruned layers do not run in this step
            return super().build(common_prefix_len, of_kept_tokens(common_attn_metadata, step), *args, **kwargs)

    return private.subclass_attention_backend(PREFIX, backend, PrunedBuilder)


def of_kept_tokens(common: Any, step: Step) -> Any:
    """``CommonAttentionMetadata`` of the rows of ``step`` that have kept tokens, with these as queries."""
    device = common.query_start_loc.device
    starts = torch.from_numpy(step.starts)
    rows, tokens = torch.from_numpy(step.rows), torch.from_numpy(step.kept_tokens)
    rows_there, tokens_there = rows.to(device), tokens.to(device)

    def at(values: Any, index: torch.Tensor) -> Any:
        return None if values is None else values[index.to(values.device)]

    return common.replace(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=common.seq_lens[rows_there],
        seq_lens_cpu_upper_bound=at(common.seq_lens_cpu_upper_bound, rows),
        num_reqs=len(rows),
        num_actual_tokens=len(tokens),
        max_query_len=int(step.kept.max()),
        block_table_tensor=common.block_table_tensor[rows_there],
        slot_mapping=common.slot_mapping[tokens_there],
        positions=at(common.positions, tokens),
        is_prefilling=at(common.is_prefilling, rows),
        rswa_prefix_lens=at(common.rswa_prefix_lens, rows),
        req_idx=None if common.req_idx is None else common.req_idx[step.rows],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
