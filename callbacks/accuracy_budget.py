"""AccuracyBudget: picks the smallest depth whose loss stays within the budget, with a confidence bound.

It watches :class:`pop_lightning.evaluate.Evaluation` runs: on the search split it narrows the candidates down, on the
verify split, which it sees once, it tests them in a fixed sequence. It measures and decides; the pipeline acts.
"""

import lightning

from pop_lightning.errors import InputError
from pop_lightning.metrics import Verdict, fixed_sequence, row_loss


class AccuracyBudget(lightning.Callback):
    """Pick a depth under ``max_drop`` at ``confidence``.

    Variants of the evaluation that take part are named by their depth (``{depth: variant name}`` in :meth:`watch`).

    Args:
        metric: ``agreement``, ``nll_increase`` or ``exact_match``.
        max_drop: absolute fraction for rates, nats per response token for NLL.
        confidence: of the bound on the verify split.
        min_pruned: the fewest pruned layers worth exporting; the last layer is free, so at least 2 as a rule.

    Attributes:
        sequence: after the search: depths to verify, shallowest pruning first.
        verdicts: after the verification.
        depth: the chosen depth, or None where nothing qualifies.
        decisions: one readable line per decision.
    """

    def __init__(
        self, metric: str = "agreement", max_drop: float = 0.01, confidence: float = 0.95, min_pruned: int = 2
    ):
        self.metric, self.max_drop, self.confidence, self.min_pruned = metric, max_drop, confidence, min_pruned
        self.sequence: list[int] = []
        self.verdicts: list[Verdict] = []
        self.depth: int | None = None
        self.decisions: list[str] = []
        self._stage, self._names = None, {}
        self._verified = False

    def watch(self, stage: str, names: dict[int, str]) -> "AccuracyBudget":
        """Say what the next ``validate`` run is: ``search`` or ``verify``, and which variant stands for which depth."""
        if stage == "verify" and self._verified:
            raise InputError("the verify split was opened already; a second look would void its bound.")
        self._stage, self._names = stage, dict(names)
        return self

    def on_validation_epoch_end(self, trainer, module) -> None:
        losses = {depth: row_loss(module.rows(name), self.metric).tolist() for depth, name in self._names.items()}
        if self._stage == "search":
            self._search(losses, module.decoder.num_layers)
        elif self._stage == "verify":
            self._verified = True
            self._verify(losses, module.decoder.num_layers)
        self._stage = None

    def _search(self, losses: dict[int, list[float]], layers: int) -> None:
        """Keep the depths whose mean on the search split fits, shallowest pruning first."""
        means = {depth: sum(values) / len(values) for depth, values in losses.items()}
        worthwhile = sorted((d for d in means if layers - d >= self.min_pruned), reverse=True)
        fitting = [depth for depth in worthwhile if means[depth] <= self.max_drop]
        self.sequence = fitting
        for depth in sorted(means, reverse=True):
            verdict = "within" if means[depth] <= self.max_drop else "above"
            self.decisions.append(
                f"search: depth {depth} loses {means[depth]:.4f} {self._unit} on {len(losses[depth])} rows, "
                f"{verdict} the budget of {self.max_drop:g}"
            )
        text = ", ".join(map(str, self.sequence)) or f"none prunes {self.min_pruned} layers within the budget"
        self.decisions.append(f"search: depths to verify, shallowest pruning first: {text}")

    def _verify(self, losses: dict[int, list[float]], layers: int) -> None:
        self.verdicts = fixed_sequence(self.sequence, losses, self.metric, self.max_drop, self.confidence)
        passed = [verdict for verdict in self.verdicts if verdict.passed]
        self.depth = passed[-1].depth if passed else None
        for verdict in self.verdicts:
            self.decisions.append(
                f"verify: depth {verdict.depth} loses {verdict.value:.4f} {self._unit}, at most {verdict.bound:.4f} "
                f"at {self.confidence:.0%} confidence on {verdict.rows} rows: "
                f"{'passed' if verdict.passed else 'failed, stop'}"
            )
        if self.depth is None:
            self.decisions.append(f"verify: no depth keeps the budget of {self.max_drop:g}: nothing is exported")
        else:
            self.decisions.append(f"verify: depth {self.depth} of {layers} is the deepest pruning that passed")

    @property
    def _unit(self) -> str:
        return "nats per response token" if self.metric == "nll_increase" else f"{self.metric} (fraction)"
