"""The method: projections, the stage-aware prefill, counted operations."""
