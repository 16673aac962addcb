"""The report of a training run, as a table for a terminal and as one HTML page.

It takes `batchnorm.experiment.results` and measures nothing.
"""
