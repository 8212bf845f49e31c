"""The names that plans, recipes and artifacts share: kinds of projections and metrics of the budget."""

# A kind is the file of that name in fitting/, which nothing below it has to import to know the name.
KINDS = ("reuse", "closed_form", "lora", "full")
METRICS = ("agreement", "nll_increase", "exact_match")
