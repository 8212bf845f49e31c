"""A dry run: real code over a model on the meta device, counting the bytes and operations that it would take.

Parameters and activations have shapes and no values; what decides shapes (token ids, masks, positions: small tensors of
whole numbers) keeps its values, so that modules, autograd and optimisers run as they are. The preflight sends every
stage of a fit through here, so its figures follow from the code that will run and not from a formula beside it.
"""

import gc
import weakref
from contextlib import ExitStack
from functools import cache
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry

from pop_lightning.pruning.flops import visible_pairs

_META = torch.device("meta")
_KEPT = 2**20  # elements of the largest tensor whose values are kept
_aten = torch.ops.aten
_IN_PLACE = {
    getattr(getattr(_aten, name), overload)
    for name in ("add_", "sub_", "mul_", "div_", "copy_", "addcmul_", "addcdiv_", "lerp_", "fill_", "zero_", "sqrt_")
    for overload in getattr(_aten, name).overloads()
}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index.Tensor}


class DryRun:
    """Count what runs inside ``with dry_run:``; a model under it lies on the meta device.

    Attention goes as a fused kernel takes it (``attn_implementation: sdpa``): no scores in memory, a mask in the dtype
    of the queries. Eager attention runs as written, with its scores.

    Args:
        gpu: count what a GPU's kernels take beside their results (a float32 accumulator in the attention's backward
            pass), not what a CPU's take.

    Attributes:
        held: bytes alive now, of tensors made inside.
        peak: the most bytes alive at one time, since :meth:`reset`.
        flops: operations, 2 per multiply-add, of products, attention (pairs up to the causal limit) and Cholesky.
    """

    def __init__(self, *, gpu: bool = False):
        self.gpu = gpu
        self.held = self.peak = self.flops = 0
        self._live: dict[int, weakref.ref] = {}
        self._modes = ExitStack()

    def __enter__(self) -> "DryRun":
        # What was there before is not looked at again by the collections of `reset`.
        gc.freeze()
        self._modes.callback(gc.unfreeze)
        self._modes.enter_context(_Dispatch(self))
        # On the meta device PyTorch would write the scores out. A mode for functions would miss what checkpoints rerun.
        self._modes.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", self._attend))
        return self

    def __exit__(self, *error) -> None:
        self._modes.close()

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=_META)
        return _Fused.apply(self, query, key, value, attn_mask, is_causal)

    def reset(self) -> None:
        """Start a new measurement: ``peak`` from what is held now, ``flops`` from 0.

        Modules that went before may wait in cycles for Python to free them; they are freed first.
        """
        gc.collect()
        self.peak, self.flops = self.held, 0

    def pass_by(self, size: int) -> None:
        """``size`` bytes that an operator takes and gives back."""
        self.peak = max(self.peak, self.held + size)

    def track(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed, once."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if not size or key in self._live:
            return

        def freed(_, key=key, size=size):
            self._live.pop(key, None)
            self.held -= size

        self._live[key] = weakref.ref(storage, freed)
        self._add(size)

    def _add(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)


class _Dispatch(TorchDispatchMode):
    """Every operator: run on meta or, where all that it reads is known, for real; results and operations counted."""

    def __init__(self, run: DryRun):
        super().__init__()
        self.run = run
        self.seen: dict[tuple, tuple] = {}  # layers repeat one another: what an operator makes of which shapes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known, unknown = _places(args, kwargs)
        fresh = not (_aliases(func) or func._schema.is_mutable)
        key = _signature(func, args, kwargs) if fresh and unknown and not known else None
        if key in self.seen:
            layouts, single, flops, scratch = self.seen[key]
            out = [torch.empty_strided(*layout, dtype=dtype, device=_META) for *layout, dtype in layouts]
            self.run.flops += flops
            for each in out:
                self.run.track(each)
            self.run.pass_by(scratch)
            return out[0] if single else tuple(out)
        out = self._call(func, args, kwargs, known, unknown)
        formula = flop_registry.get(func._overloadpacket) or _FORMULAS.get(func)
        flops = formula(*args, **kwargs, out_val=out) if formula is not None else 0
        self.run.flops += flops
        if fresh:
            every = [out] if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else []
            made = [each for each in every if isinstance(each, Tensor)]
            for each in made:
                self.run.track(each)
            scratch = 0 if self.run.gpu else _scratch(func, args)
            self.run.pass_by(scratch)
            if key is not None and made and len(made) == len(every) and all(each.is_meta for each in made):
                layouts = [(each.shape, each.stride(), each.dtype) for each in made]
                self.seen[key] = layouts, isinstance(out, Tensor), flops, scratch
        return out

    def _call(self, func, args, kwargs, known: bool, unknown: bool):
        if not unknown and kwargs.get("device") == _META and _whole(func, args, kwargs):
            return func(*args, **kwargs | {"device": "cpu"})
        if not known and not unknown:
            return func(*args, **kwargs)
        if unknown and func in _UNKNOWN:
            return _UNKNOWN[func](*args, **kwargs)
        if not unknown and not _too_large(func, args, kwargs):
            return func(*args, **kwargs)
        if func in _INDEXING:
            args = (args[0], _as_numbers(args[1]), *args[2:])
        if func._schema.is_mutable and isinstance(args[0], Tensor) and (func in _IN_PLACE or not args[0].is_meta):
            # The shape stays, and so do known values that unknown ones are written over: they decide a shape.
            return args[0]
        if known:
            args, kwargs = _on_meta(args, kwargs)
        return func(*args, **kwargs)


def _places(args, kwargs) -> tuple[bool, bool]:
    """Whether tensors with values are among the arguments, and whether such without are."""
    known = unknown = False
    for each in (*args, *kwargs.values()):
        for part in each if isinstance(each, list | tuple) else (each,):
            if isinstance(part, Tensor):
                if part.is_meta:
                    unknown = True
                else:
                    known = True
    return known, unknown


def _on_meta(args, kwargs) -> tuple:
    args, kwargs = tree_map_only(Tensor, lambda each: each.to(_META), (args, kwargs))
    return args, kwargs | ({"device": _META} if kwargs.get("device") is not None else {})


def _signature(func, args: tuple, kwargs: dict) -> tuple | None:
    """What the layout of an operator's result follows from."""
    key = [func]
    for each in (*args, *kwargs.items()):
        parts = each if isinstance(each, list | tuple) else (each,)
        for part in parts:
            key.append((part.shape, part.stride(), part.dtype) if isinstance(part, Tensor) else part)
        key.append(len(parts))
    try:
        hash(key := tuple(key))
    except TypeError:
        return None
    return key


@cache
def _aliases(func) -> bool:
    # An unsafe view says that it is none.
    return func is _aten._unsafe_view.default or any(each.alias_info is not None for each in func._schema.returns)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, query, key, value, mask, is_causal):
        batch, heads, rows, width = query.shape
        pairs = visible_pairs(0 if is_causal else max(0, key.shape[2] - rows), max(rows, key.shape[2]), None)
        ctx.run, ctx.operations = run, 2 * batch * heads * (width + value.shape[3]) * pairs
        run.flops += ctx.operations
        # Kernels write token by token, all heads of a token together.
        output = query.new_empty(batch, rows, heads, value.shape[3]).transpose(1, 2)
        statistics = query.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, statistics)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        ctx.run.flops += ctx.operations * 5 // 2  # five products where the forward pass has two
        grads = [_by_token(each) for each in (query, key, value)]
        ctx.run.pass_by(4 * query.numel() if ctx.run.gpu else 0)
        return None, *grads, None, None


def _by_token(like: Tensor) -> Tensor:
    batch, heads, tokens, width = like.shape
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _scratch(func, args) -> int:
    """What a CPU's operator takes beside its result, where that is large.

    oneDNN's batched bfloat16 product copies an operand that is no plain block, such as a head's weight that is spread
    over the batch because the rows are a slice.
    """
    if func is not _aten.bmm.default or args[0].dtype != torch.bfloat16:
        return 0
    return sum(each.numel() * each.itemsize for each in args if not each.is_contiguous())


def _whole(func, args, kwargs) -> bool:
    """Whether a factory, or a copy of known values, makes whole numbers."""
    dtype = kwargs.get("dtype")
    if dtype is None and args and isinstance(args[0], Tensor):
        dtype = args[0].dtype
    if dtype is None:
        numbers = [each for each in args if isinstance(each, int | float)]
        return func._overloadpacket is _aten.arange and all(isinstance(each, int) for each in numbers)
    return not (dtype.is_floating_point or dtype.is_complex)


def _too_large(func, args, kwargs) -> bool:
    """Whether what an operator makes of known values is too large to be worth having."""
    sizes = [each.numel() for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    if _aliases(func) or (len(sizes) == 1 and sizes[0] <= _KEPT) or max(sizes, default=0) <= 256:
        return False
    args, kwargs = _on_meta(args, kwargs)
    try:
        out = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):
        return False  # its size follows from values
    return any(isinstance(each, Tensor) and each.numel() > _KEPT for each in tree_flatten(out)[0])


def _as_numbers(indices: list) -> list:
    """Boolean masks among indices as the numbers of what they pick; an unknown mask picks everything."""
    found = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        elif index.is_meta:
            found += [torch.empty(index.numel(), dtype=torch.long, device=_META)] * index.dim()
        else:
            found += index.nonzero(as_tuple=True)
    return found


def _cholesky(matrix, *args, out_val=None, **kwargs) -> int:
    return matrix.numel() * matrix.shape[-1] // 3


def _cholesky_solve(right, factor, *args, out_val=None, **kwargs) -> int:
    return 2 * right.numel() * factor.shape[-1]


def _number(x: Tensor):
    """What only a real run knows reads as true, or as one."""
    return True if x.dtype == torch.bool else 1


def _everything(mask: Tensor) -> Tensor:
    return torch.empty(mask.numel(), mask.dim(), dtype=torch.long, device=_META)


def _copy(x: Tensor, *, device=None, dtype=None, **others) -> Tensor:
    """A copy; what leaves the meta device becomes zeros."""
    if device is not None and torch.device(device) != _META:
        return torch.zeros(x.shape, dtype=dtype or x.dtype)
    return _aten._to_copy.default(x, device=device, dtype=dtype, **others)


_UNKNOWN = {
    _aten._local_scalar_dense.default: _number,
    _aten.nonzero.default: _everything,
    _aten._to_copy.default: _copy,
}
_FORMULAS = {
    _aten.linalg_cholesky_ex.default: _cholesky,
    _aten.cholesky_solve.default: _cholesky_solve,
    _aten._cholesky_solve_helper.default: _cholesky_solve,
}
