"""Using a pruned model: the generator and its artifact."""
