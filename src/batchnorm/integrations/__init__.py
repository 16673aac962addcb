"""Callbacks for the trainers of Lightning and of Hugging Face's Transformers.

Each module needs its library, and nothing of ours imports it. Both do the same, in `training`.
"""
