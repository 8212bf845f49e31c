"""Latency, held against the work that no pruned prefill can avoid."""
