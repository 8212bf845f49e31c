"""What decides correctness without an engine: which tokens are context, how blocks are hashed, a rank's rows."""

import hashlib
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pop_lightning import PruningPlan
from pop_lightning.serving.prefix_cache import keyed_hasher
from pop_lightning.serving.projections import rank_rows
from pop_lightning.serving.steps import Announced, split

plans = st.builds(PruningPlan, st.just(3), st.one_of(st.integers(1, 9), st.sampled_from([0.05, 0.1, 0.5])))
# A row of a step: original prompt, tokens computed before, tokens that the step computes.
rows = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 80), st.integers(1, 40)), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(plans, rows)
def test_a_token_is_context_by_its_index_in_the_original_prompt_alone(plan, rows):
    prompts, computed, scheduled = (list(each) for each in zip(*rows, strict=True))
    step = split(plan, scheduled, computed, prompts)
    wanted = [
        index < plan.context_of(prompt) for prompt, before, count in rows for index in range(before, before + count)
    ]
    assert step.is_context.tolist() == wanted
    assert step.tokens == len(wanted)
    assert step.prunes == any(wanted)
    assert sorted([*step.context_tokens, *step.kept_tokens]) == list(range(len(wanted)))


@settings(max_examples=200, deadline=None)
@given(plans, rows)
def test_kept_tokens_are_the_end_of_their_row(plan, rows):
    prompts, computed, scheduled = (list(each) for each in zip(*rows, strict=True))
    step = split(plan, scheduled, computed, prompts)
    ends = np.cumsum(scheduled)
    for number, row in enumerate(step.rows):
        own = step.kept_tokens[step.starts[number] : step.starts[number + 1]]
        assert own.tolist() == list(range(ends[row] - step.kept[row], ends[row]))


@settings(max_examples=100, deadline=None)
@given(plans, st.integers(1, 60), st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_chunks_and_a_restart_never_change_which_tokens_are_context(plan, prompt, chunks):
    kinds: dict[int, set[bool]] = {}
    computed = 0
    for number, count in enumerate(chunks):
        if number == len(chunks) // 2:
            computed = 0  # preempted: everything is computed again, generated tokens too
        step = split(plan, [count], [computed], [prompt])
        for index, is_context in enumerate(step.is_context, computed):
            kinds.setdefault(index, set()).add(bool(is_context))
        computed += count
    assert all(kind == {index < plan.context_of(prompt)} for index, kind in kinds.items())


def test_a_step_is_taken_once():
    announced, step = Announced(), split(PruningPlan(3), [4], [0], [4])
    announced.announce(step)
    assert announced.pruning is step
    assert announced.take() is step
    assert announced.take() is None
    announced.announce(split(PruningPlan(3), [1], [4], [4]))
    assert announced.pruning is None


SIZE = 4


def make_hasher(size, hash_block):
    """What vLLM's ``get_request_block_hasher`` does: hashes a request's full blocks that have none yet."""

    def hash_blocks(request):
        hashes, found = list(request.block_hashes), []
        while (len(hashes) + 1) * size <= len(request.tokens):
            tokens = tuple(request.tokens[len(hashes) * size : (len(hashes) + 1) * size])
            found.append(hash_block((hashes[-1] if hashes else None, tokens, None)))
            hashes.append(found[-1])
        return found

    return hash_blocks


def hashes(plan, tokens, prompt, parts=()):
    """Block hashes of a request that had ``parts`` numbers of tokens before it had all."""
    hasher = keyed_hasher(plan, make_hasher, SIZE, lambda content: hashlib.sha256(repr(content).encode()).digest())
    request = SimpleNamespace(tokens=[], num_prompt_tokens=prompt, block_hashes=[])
    for end in (*parts, len(tokens)):
        request.tokens = tokens[:end]
        request.block_hashes += hasher(request)
    return request.block_hashes


@settings(max_examples=200, deadline=None)
@given(plans, st.integers(1, 40), st.integers(1, 40), st.integers(0, 10))
def test_blocks_share_a_hash_only_where_their_tokens_ran_alike(plan, one, other, more):
    tokens = list(range(60))
    first, second = (hashes(plan, tokens[: prompt + more], prompt) for prompt in (one, other))
    for number, (ours, theirs) in enumerate(zip(first, second, strict=False)):
        end = (number + 1) * SIZE
        alike = min(plan.context_of(one), end) == min(plan.context_of(other), end)
        assert (ours == theirs) == alike


def test_blocks_of_generated_tokens_are_hashed_as_if_they_had_come_at_once():
    plan, tokens = PruningPlan(3, 2), list(range(30))
    assert hashes(plan, tokens, 11, parts=(11, 13, 14, 20)) == hashes(plan, tokens, 11)


def test_ranks_share_the_heads_and_repeat_them_where_there_are_too_few():
    heads, width = 4, 3
    weight = torch.arange(2 * heads * width).float()[:, None]  # [k heads | v heads]
    halves = [rank_rows(weight, 2, heads, width, rank, 2) for rank in range(2)]
    whole = torch.stack([each.unflatten(0, (2, 2, width)) for each in halves], dim=1)
    assert torch.equal(whole.flatten(0, 3), weight)
    assert torch.equal(rank_rows(weight, 1, heads, width, 5, 8), rank_rows(weight, 1, heads, width, 4, 8))
    assert rank_rows(weight, 1, heads, width, 5, 8)[:width, 0].tolist() == [6.0, 7.0, 8.0]
