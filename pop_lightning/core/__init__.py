"""What everything may use: errors, files, the plan, memory, processes."""
