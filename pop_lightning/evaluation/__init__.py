"""The cost of pruning in quality: metrics, bounds, and the search for a depth."""
