"""Following data through a model: tracing one block, and what a trace takes for granted."""
