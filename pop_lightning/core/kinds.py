"""The names that plans, recipes and artifacts share: kinds of projections and metrics of the budget."""

KINDS = ("reuse", "closed_form", "lora", "full")
METRICS = ("agreement", "nll_increase", "exact_match")
