"""Artifacts in vLLM: its server and its ``LLM`` with the pruned prefill. Importing this imports nothing of vLLM."""

from pop_lightning.serving.arguments import engine_args

__all__ = ["engine_args"]
