"""Follows data through a model: `tracing.trace` turns a forward into a graph.

`assumptions` collects the conditions under which the graph is valid. Changes of a graph, such as
fused layers, belong to the tool that makes them.
"""
