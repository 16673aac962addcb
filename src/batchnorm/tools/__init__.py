"""Tools for models that exist already. Each room is one tool, on one kit for changing a model.

How a tool ends depends on what it does:

- Tools that change a model for a while return a handle. Leave its ``with`` block, or call
  ``remove()``: `guard`, `watch`, `count_recomputation_once`, `keep_statistics_in_float32`,
  `no_stats_update`, `transaction`.
- Tools whose change is part of the model, and is saved with it, are undone by a function of their
  own, also on a copy: `freeze` by `unfreeze`, `accelerate` by `restore`.
- The others change values once, for good: `recalibrate`, `reset_poisoned_statistics`,
  `ema_update`; or classes: `to_torch`. `merge_state_dicts` returns new values.

A layer that a converter rebuilds inherits what is attached to it. After any error a model is what
it was, bit for bit. No tool imports another; what they share is in `patching` (the kit), `flow`
(following data through a model) and `wording`. Training loops are the user's.
"""
