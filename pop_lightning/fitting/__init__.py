"""Ways to get projections, and importance scoring."""
