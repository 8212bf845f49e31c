"""What hooks do with vLLM's own classes, without an engine; the newer runner as far as Triton is not needed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pop_lightning import PruningPlan
from pop_lightning.core.errors import InputError
from pop_lightning.serving import private, runner
from pop_lightning.serving.attention import of_kept_tokens, pruned_backend
from pop_lightning.serving.steps import announced, split

pytestmark = pytest.mark.vllm
PLAN = PruningPlan(3, 2)


@pytest.fixture(autouse=True)
def _nothing_announced():
    announced.take()
    yield
    announced.take()


def common():
    """Three rows: 2 of 6 tokens are kept, none of 3, and a decode step of 1."""
    lengths = torch.tensor([6, 3, 1])
    starts = torch.tensor([0, 6, 9, 10], dtype=torch.int32)
    return private.CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([8, 3, 20], dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor([8, 3, 20]),
        num_reqs=3,
        num_actual_tokens=10,
        max_query_len=6,
        max_seq_len=20,
        block_table_tensor=torch.arange(12).reshape(3, 4),
        slot_mapping=torch.arange(100, 110),
        positions=torch.cat([torch.arange(each) for each in lengths]),
        is_prefilling=torch.tensor([True, True, False]),
    )


def test_metadata_of_the_kept_tokens():
    step = split(PLAN, [6, 3, 1], [2, 0, 19], [8, 9, 12])
    found = of_kept_tokens(common(), step)
    assert found.num_reqs == 2
    assert found.num_actual_tokens == 3
    assert found.max_query_len == 2
    assert found.query_start_loc.tolist() == found.query_start_loc_cpu.tolist() == [0, 2, 3]
    assert found.seq_lens.tolist() == found.seq_lens_cpu_upper_bound.tolist() == [8, 20]
    assert found.block_table_tensor.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert found.slot_mapping.tolist() == [104, 105, 109]
    assert found.positions.tolist() == [4, 5, 0]
    assert found.is_prefilling.tolist() == [True, False]


def test_a_backend_that_writes_inside_its_kernel_is_refused():
    class Fused:
        forward_includes_kv_cache_update = True

        @staticmethod
        def get_name():
            return "FUSED"

    with pytest.raises(InputError, match=r"the attention backend FUSED .* choose another one"):
        pruned_backend(Fused)


def newer_runner(prompts):
    model = SimpleNamespace(plan=PLAN, projections=None)
    state = SimpleNamespace(prompts=np.array(prompts))
    return SimpleNamespace(get_model=lambda: model, model_state=state)


def batch(requests, scheduled, computed, prefilling):
    return SimpleNamespace(
        idx_mapping_np=np.array(requests),
        num_scheduled_tokens=np.array(scheduled),
        num_computed_prefill_tokens_np=np.array(computed),
        is_prefilling_np=np.array(prefilling),
    )


def test_the_newer_runner_announces_and_keeps_context_out_of_graphs():
    found = batch([2, 0], [1, 1], [5, 9], [True, False])
    # Request 2 computes token 5 of 12, which is context, in a step of one token per row.
    given = runner._announce_v2(lambda *_: (found, 1), newer_runner([9, 0, 12]), None, False)
    assert given == (found, None)
    step = announced.take()
    assert step.context.tolist() == [1, 0]
    assert step.kept.tolist() == [0, 1]
    # Token 10 of 12 is kept: the graph of uniform decode steps may run.
    found.num_computed_prefill_tokens_np[0] = 10
    assert runner._announce_v2(lambda *_: (found, 1), newer_runner([9, 0, 12]), None, False) == (found, 1)
    assert not announced.take().prunes


def test_the_newer_runner_without_the_model_s_state_does_not_serve():
    here = newer_runner([9])
    here.model_state = SimpleNamespace()
    with pytest.raises(InputError, match="did not ask the model for its model state"):
        runner._announce_v2(lambda *_: (batch([0], [4], [0], [True]), None), here, None, False)


def test_the_model_state_remembers_the_original_prompt():
    state = object.__new__(runner.model_state_class())
    state.rope_state = state.prompt_embeds_state = None
    state.prompts = np.zeros(4, dtype=np.int64)
    state.add_request(2, SimpleNamespace(prompt_len=7, prefill_token_ids=list(range(30))))
    assert state.prompts.tolist() == [0, 0, 7, 0]
    announced.announce(split(PLAN, [4], [0], [9]))
    with pytest.raises(RuntimeError, match="dispatched to a graph of whole steps"):
        state.prepare_attn(None, SimpleNamespace(name="FULL"))


def test_ordinary_models_are_left_alone():
    plain = SimpleNamespace(get_model=lambda: SimpleNamespace())
    assert runner._announce_v1(lambda *_: "result", plain, None, None) == "result"
    assert runner._announce_v2(lambda *_: ("batch", 1), plain, None, False) == ("batch", 1)
    assert runner._dispatch_v1(lambda *_, force_eager: force_eager, plain) is False
    assert announced.take() is None
    announced.announce(split(PLAN, [4], [0], [9]))
    assert runner._dispatch_v1(lambda *_, force_eager: force_eager, plain) is True
