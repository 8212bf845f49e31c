"""Latency of pruned prefill, compared with the work that it cannot avoid."""
