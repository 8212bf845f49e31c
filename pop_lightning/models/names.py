"""Names that Transformers has changed."""

from typing import Any

from transformers.generation.utils import ALL_CACHE_NAMES

# Of the cache, in arguments and outputs of models and layers: ``cache`` since 5.24, ``past_key_values`` before.
CACHE: str = ALL_CACHE_NAMES[0]


def name_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments in which a cache may have either name, with the one that this version of Transformers reads."""
    names = ("past_key_values", "cache")
    caches = [arguments[name] for name in names if arguments.get(name) is not None]
    others = {name: value for name, value in arguments.items() if name not in names}
    return others | ({CACHE: caches[0]} if caches else {})
