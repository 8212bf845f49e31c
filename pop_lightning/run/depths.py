"""Which depths and boundaries are fitted and measured: between importance scoring and the search in the flow.

The pipeline asks here for what it will do, the check for what a run would do.
"""

from collections.abc import Iterable, Sequence

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import Kept, PruningPlan, number_of
from pop_lightning.data.rows import Row
from pop_lightning.evaluation.bounds import Certifiable
from pop_lightning.fitting.importance import candidates as place_candidates
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.flops import speedup
from pop_lightning.pruning.salient import check_salient
from pop_lightning.run.recipe import Budget, Recipe


def condition(recipe: Recipe) -> float | None:
    """The loss that may not be exceeded; None where the recipe gives a depth or a speedup instead."""
    given = recipe.depth is not None or recipe.budget.speedup is not None
    return None if given else recipe.budget.max_drop


def check_target(recipe: Recipe, decoder: Decoder, kept: Sequence[Kept], tokens: int, certifiable: Certifiable) -> None:
    """Refuse a target that no depth can reach, or that the verify rows cannot show to be kept.

    Args:
        kept: :func:`ways`, what may run in full.
        tokens: prompt length that a requested speedup is counted at.
        certifiable: what the verify split can show.

    Raises:
        InputError: names the key to change.
    """
    budget = recipe.budget
    if recipe.depth is not None:
        if recipe.depth >= decoder.num_layers:
            raise InputError(
                "prunes nothing", key="depth", found=recipe.depth, expected=f"at most {decoder.num_layers - 1}"
            )
        decoder.check_depth(recipe.depth)
    elif budget.speedup is not None:
        reaching(budget, decoder, kept, tokens)
    else:
        certifiable.refuse_too_few()


def to_measure(
    recipe: Recipe, decoder: Decoder, prefill_importance: Sequence[float], kept: Sequence[Kept], tokens: int
) -> list[int]:
    """Depths to fit and measure, shallowest pruning first: the given one, :func:`candidates`, or :func:`reaching`'s.

    Args:
        kept: :func:`ways`, what may run in full.
        tokens: prompt length that a requested speedup is counted at.
    """
    if recipe.depth is not None:
        return [recipe.depth]
    if recipe.budget.speedup is None:
        return candidates(recipe.budget, prefill_importance, decoder)
    return sorted(set(reaching(recipe.budget, decoder, kept, tokens).values()), reverse=True)


def ways(recipe: Recipe, decoder: Decoder, boundaries: Sequence[int | float]) -> list[Kept]:
    """:meth:`Recipe.kept`, without salient tokens where these are left to the search and the base cannot run them.

    Args:
        boundaries: :func:`listed_boundaries`.
    """
    kept = recipe.kept(boundaries)
    if recipe.salient == "auto" and cannot_select(recipe, decoder):
        return [each for each in kept if not each.salient] or kept
    return kept


def cannot_select(recipe: Recipe, decoder: Decoder) -> str | None:
    """Why the base cannot run salient tokens; None where it can."""
    # A check has no kernels, so the recipe says which attention a run would use.
    if "flash" in (recipe.model.attn_implementation or ""):
        return f"attn_implementation {recipe.model.attn_implementation!r} does not take a mask for each token"
    try:
        check_salient(decoder, PruningPlan(decoder.smallest_depth, salient=1))
    except InputError as error:
        return str(error).rstrip(".")
    return None


def listed_boundaries(budget: Budget, decoder: Decoder, rows: Iterable[Row], tokens: int) -> list[int | float]:
    """``budget.boundaries`` that leave a context in a prompt of ``tokens`` tokens and begin in no row's image."""
    rows = [row for row in rows if row.media]
    possible = {k for k in budget.boundaries if number_of(k, tokens) < tokens and _split_by(decoder, rows, k) is None}
    return sorted(possible, key=lambda k: number_of(k, tokens))


def check_context(recipe: Recipe, kept: Sequence[Kept], longest: int) -> None:
    """Raise :class:`InputError` where every prompt would run in full, so that no plan prunes anything.

    Args:
        kept: :func:`ways`, what may run in full.
        longest: tokens of the longest prompt.
    """
    if any(number_of(each.boundary, longest) < longest for each in kept):
        return
    what, advice = f"boundary {kept[0].boundary} leaves no", "a smaller boundary"
    if recipe.boundary == "auto" and recipe.depth is None:
        what, advice = f"none of budget.boundaries {recipe.budget.boundaries} leaves a", "smaller ones"
    raise InputError(
        f"{what} context in any row, whose longest prompt has {longest} tokens: give {advice} or longer prompts."
    )


def without_context(recipe: Recipe, kept: Sequence[Kept], tokens: int) -> str | None:
    """Which of ``budget.boundaries`` the search leaves out because they leave no context in a prompt of ``tokens``.

    Returns:
        A line for the user; None where the boundary is given, or all of them leave a context.
    """
    used = {each.boundary for each in kept}
    short = [k for k in dict.fromkeys(recipe.budget.boundaries) if k not in used and number_of(k, tokens) >= tokens]
    if recipe.boundary != "auto" or recipe.depth is not None or not short:
        return None
    leave = "leaves" if len(short) == 1 else "leave"
    return (
        f"boundaries: {', '.join(map(str, short))} of budget.boundaries {leave} no context in a prompt of {tokens} "
        f"tokens (the rows' median), so the search uses {', '.join(map(str, sorted(used)))}"
    )


def check_images(
    recipe: Recipe, decoder: Decoder, rows: Iterable[Row], boundaries: Iterable[int | float], shards: bool
) -> None:
    """Raise :class:`InputError` if rows with images or videos cannot be used with a base in shards, or a boundary."""
    rows = [row for row in rows if row.media]
    if rows and shards:
        kind = "images" if rows[0].images else "videos"
        raise InputError(
            f"{rows[0].origin} has {kind}, and trainer.strategy {recipe.trainer['strategy']} needs every process to "
            "read the same number at once: use ddp or deepspeed_stage_2, or rows of text."
        )
    for k in boundaries:
        check_split(decoder, rows, k)


def check_split(decoder: Decoder, rows: Iterable[Row], boundary: int | float) -> None:
    """Raise :class:`InputError` where a boundary begins inside an image of a row, if that cannot be."""
    if (row := _split_by(decoder, rows, boundary)) is not None:
        raise InputError(
            f"boundary {boundary} begins inside an image of {row.origin}, whose tokens attend to one another: choose a "
            "boundary that ends before the image or holds all of it."
        )


def _split_by(decoder: Decoder, rows: Iterable[Row], boundary: int | float) -> Row | None:
    """The first row that has an image in which the boundary begins, where that cannot be."""
    return next(
        (row for row in rows if decoder.vision.split_by(row.prompt_ids, number_of(boundary, len(row.prompt_ids)))),
        None,
    )


def candidates(budget: Budget, prefill_importance: Sequence[float], decoder: Decoder) -> list[int]:
    """Depths to measure, shallowest pruning first.

    A number of them is placed by the importance (:func:`pop_lightning.fitting.importance.candidates`).

    Args:
        prefill_importance: one value per layer.

    Raises:
        InputError: ``budget.candidates`` or ``budget.min_pruned`` does not fit this model.
    """
    wanted, layers, smallest = budget.candidates, decoder.num_layers, decoder.smallest_depth
    every = list(range(layers - 1, smallest - 1, -1))
    if wanted == "all":
        return every
    if isinstance(wanted, list):
        odd = [depth for depth in wanted if not 1 <= depth <= layers]
        if odd:
            raise InputError(f"budget.candidates must lie in {smallest}..{layers} for this model, found {odd[0]}.")
        if min(wanted) == layers:
            raise InputError(f"budget.candidates holds only depth {layers}, which prunes nothing; name a smaller one.")
        try:
            decoder.check_depth(min(wanted))
        except InputError as error:
            raise InputError(f"budget.candidates holds depth {min(wanted)}: {error}") from error
        return sorted({depth for depth in wanted if depth < layers}, reverse=True)
    if layers - budget.min_pruned < smallest:
        raise InputError(
            f"budget.min_pruned {budget.min_pruned} leaves no depth of a model of {layers} layers whose smallest is "
            f"{smallest}."
        )
    return place_candidates(prefill_importance, wanted, smallest=smallest, min_pruned=budget.min_pruned)


def reaching(budget: Budget, decoder: Decoder, kept: Sequence[Kept], tokens: int) -> dict[Kept, int]:
    """By what runs in full, the largest depth whose counted prefill speedup at ``tokens`` prompt tokens suffices.

    All depths are looked at, or those that ``budget.candidates`` lists. Where no depth reaches it, it is left out.

    Raises:
        InputError: no plan reaches ``budget.speedup``; the sentence names the largest speedup there is.
    """
    layers = decoder.num_layers
    depths = range(layers - 1, decoder.smallest_depth - 1, -1)
    if isinstance(budget.candidates, list):
        depths = candidates(budget, [0.0] * layers, decoder)
    counted = {(k, depth): speedup(decoder, k.at(depth), tokens) for k in kept for depth in depths}
    found = {}
    for (k, depth), ratio in counted.items():
        if ratio >= budget.speedup:
            found[k] = max(depth, found.get(k, 0))
    if not found:
        k, depth = max(counted, key=counted.__getitem__)
        raise InputError(
            f"budget.speedup {budget.speedup:g} is more than any depth reaches: the largest counted prefill speedup at "
            f"{tokens} prompt tokens (the rows' median) is {counted[k, depth]:.2f}, at depth {depth} and {k}; "
            "lower budget.speedup or give longer prompts."
        )
    return found
