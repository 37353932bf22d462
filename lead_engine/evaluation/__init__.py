"""Held-out evaluation of a model, and comparison of selection methods with paired confidence intervals."""
