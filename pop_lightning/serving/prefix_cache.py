"""The prefix cache: a block's content must follow from its hash.

Keys and values of the pruned layers are projected for context tokens and computed for all others, so that those of a
block depend on where its request's context ends. Blocks up to there are the same for every request with these tokens;
the end of the context goes into the hash of the others.
"""

from collections.abc import Callable
from typing import Any

from pop_lightning.core.plan import PruningPlan


def keyed_hasher(
    plan: PruningPlan, make: Callable[[int, Callable[[Any], bytes]], Callable], size: int, hash_block: Callable
) -> Callable[[Any], list]:
    """vLLM's hasher of a request's blocks, with the end of the context in the hash of every block after it.

    Args:
        make: vLLM's ``get_request_block_hasher``; what it returns hashes the blocks that a request has and are not
            hashed yet, in order.
        size: tokens per block.
        hash_block: the hash of ``(parent hash, token ids, extra keys)``.
    """

    def hash_blocks(request: Any) -> list:
        end = len(request.block_hashes) * size
        context = plan.context_of(request.num_prompt_tokens)

        def hash_keyed(content: tuple) -> bytes:
            nonlocal end
            end += size
            parent, tokens, keys = content
            return hash_block(content if end <= context else (parent, tokens, (*(keys or ()), ("pop", context))))

        return make(size, hash_keyed)(request)

    return hash_blocks
