"""Fitting and training of projections, and importance scoring."""
