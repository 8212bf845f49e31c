"""The names that recipes and artifacts share: kinds of projections."""

# Each kind is implemented in the file of that name in fitting/. The names are here so that lower rooms can check them.
KINDS = ("reuse", "closed_form", "lora", "full")

# What chooses salient context tokens: see pruning/selectors.
SELECTORS = ("attention", "recency")
