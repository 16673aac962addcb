"""The report of a training run, as a table for a terminal and as one HTML page."""
