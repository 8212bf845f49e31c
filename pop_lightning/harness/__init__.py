"""Standard tasks through lm-eval (the extra ``eval``), which is imported only when they are run."""
