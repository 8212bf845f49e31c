"""The names that recipes and artifacts share: kinds of projections and selectors of salient tokens."""

# Each kind is implemented in the file of that name in fitting/. The names are here so that lower rooms can check them.
KINDS = ("reuse", "closed_form", "lora", "full")

# Each selector is implemented in the file of that name in pruning/selectors/.
SELECTORS = ("attention", "recency", "learned")
