"""Follows data through a model: `tracing.trace` turns a forward into a graph.

`assumptions` collects the conditions under which the graph is valid. What is done with a graph, such
as fusing layers, belongs to the tool that does it.
"""
