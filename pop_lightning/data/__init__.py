"""From calibration examples to batches."""
