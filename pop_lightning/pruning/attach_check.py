"""The attach check: what was read from a model's structure is verified by running the model, once, before pruning."""

import weakref

import torch
import torch.utils.checkpoint
from torch import Tensor

from pop_lightning.core.errors import InputError, Key
from pop_lightning.core.plan import PruningPlan
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.names import CACHE
from pop_lightning.pruning.prefill import StageAwarePrefill
from pop_lightning.pruning.projections import KVProjections

_checked: "weakref.WeakSet" = weakref.WeakSet()


@torch.no_grad()
def check_decoder(decoder: Decoder) -> None:
    """Reject a model that would be pruned incorrectly, with its name and the first difference.

    Three facts must hold on random tokens longer than one window: projecting the true input of each layer that can be
    pruned reproduces the cache that the plain model filled, the last layer's output gives the plain model's logits, and
    so does the pruned prefill at depth L-1. Runs once per model.

    Raises:
        InputError: naming the class and the first difference.
    """
    if decoder.model in _checked:
        return
    if "flash" in decoder.config._attn_implementation and any(parts.chunked for parts in decoder.parts.values()):
        raise InputError(
            f"{decoder.name} attends in chunks, which flash attention does not support; load it with "
            "attn_implementation='sdpa'."
        )
    window = max((decoder.window(layer) or 0 for layer in range(decoder.num_layers)), default=0)
    length = min(max(16, window + 8), getattr(decoder.config, "max_position_embeddings", 1 << 20))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, decoder.config.vocab_size, (1, length), generator=generator).to(decoder.model.device)
    training = decoder.model.training
    decoder.model.eval()
    try:
        _compare_with_plain(decoder, ids)
    except InputError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"{decoder.name} is not supported: pruning its last layer fails with: {reason}.") from error
    finally:
        decoder.model.train(training)
    _checked.add(decoder.model)


def _compare_with_plain(decoder: Decoder, ids: Tensor) -> None:
    """The three facts of :func:`check_decoder` on the tokens ``ids`` ``[1, tokens]``."""
    cache = decoder.new_cache()
    with decoder.tracing() as trace:
        plain = decoder.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
    for layer in range(decoder.smallest_depth, decoder.num_layers):
        reuse = decoder.reuse_map(layer)
        hidden = trace.hidden[layer]
        if reuse is None:
            kv = decoder.own_kv(layer, hidden)
        else:
            weight = reuse.weight.to(hidden.dtype)
            if not weight.isfinite().all():
                raise InputError(
                    f"{decoder.name}: the key and value weights of layer {layer}, with its norm's weight folded in, "
                    f"are not finite in {str(weight.dtype).removeprefix('torch.')}",
                    advice=("choose another ", Key("model.dtype"), ", such as bfloat16"),
                )
            bias = None if reuse.bias is None else reuse.bias.to(hidden.dtype)
            kv = torch.nn.functional.linear(decoder.normalize(hidden), weight, bias)
        keys, values = decoder.to_cache(layer, kv, trace.kwargs[layer].get("position_embeddings"))
        held = cache.layers[layer].keys.shape[-2]
        for name, ours, theirs in (
            ("keys", keys, cache.layers[layer].keys),
            ("values", values, cache.layers[layer].values),
        ):
            error = _relative(ours[:, :, -held:], theirs)
            if not error <= _tolerance(theirs.dtype):
                raise InputError(
                    f"{decoder.name} is not supported: projecting the true input of layer {layer} "
                    f"({type(decoder.layers[layer]).__name__}) does not give its cached {name} "
                    f"(relative error {error:.1e})."
                )
    depth = decoder.num_layers - 1
    error = _relative(decoder.logits(trace.hidden[depth + 1][:, -1:]), plain)
    if not error <= _tolerance(plain.dtype):
        raise InputError(
            f"{decoder.name} is not supported: the final norm and head over its last layer's output do not give "
            f"its logits (relative error {error:.1e})."
        )
    if depth >= 1:
        plan = PruningPlan(depth)
        prefill = StageAwarePrefill(KVProjections(decoder, depth), plan)
        with prefill.attached(ids.shape[1]):
            pruned = decoder.model(
                input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: decoder.new_cache()}
            ).logits
        worst = _relative(pruned, plain)
        if not worst <= _tolerance(plain.dtype):
            raise InputError(
                f"{decoder.name} is not supported: with only its last layer pruned, which loses nothing, its "
                f"logits move by {worst:.1e} (relative)."
            )


def _relative(ours: Tensor, theirs: Tensor) -> float:
    scale = theirs.float().abs().max().clamp(min=1e-30)
    return ((ours.float() - theirs.float()).abs().max() / scale).item()


def _tolerance(dtype: torch.dtype) -> float:
    """1e-5 in float32; in half precision two correct computations differ by a few roundings of the largest element."""
    return 1e-5 if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps
