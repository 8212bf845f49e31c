"""What pruning costs: metrics, bounds, the search for a depth."""
