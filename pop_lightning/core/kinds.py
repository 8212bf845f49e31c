"""The names that recipes and artifacts share: kinds of projections."""

# A kind is the file of that name in fitting/, which nothing below it has to import to know the name.
KINDS = ("reuse", "closed_form", "lora", "full")
