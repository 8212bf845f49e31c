"""One run of pop-fit: recipe, stages, run folder, processes, report."""
