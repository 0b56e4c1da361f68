"""Exported models in plain transformers and torch: each module is code that stands in model cards, and that `predict` runs.

None of them imports anything of ours. `load` gives a function from a list of values to what the model makes of them.
"""
