"""Names that Transformers has changed."""

from typing import Any

from transformers.generation.utils import ALL_CACHE_NAMES

# Of the cache, in arguments and outputs of models and layers: ``cache`` since 5.24, ``past_key_values`` before.
CACHE: str = ALL_CACHE_NAMES[0]


def name_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments in which a cache may have either name, with the one that this version of Transformers reads."""
    return {CACHE if name in ("cache", "past_key_values") else name: value for name, value in arguments.items()}
