"""What is trained next: a method is one file here, with its options, its order, its state and its checks.

A method of yours is a class made of `Method` under `@register("name")`; docs/METHODS.md adds one step by step. The
names of those that are here stand in lead_engine/config/methods.py; a module is imported when its method is chosen.
"""

from lead_engine.config.methods import MethodOptions, find_method, method_names, register
from lead_engine.selection.methods.base import Draw, Method, Order, Scorer

__all__ = ["Draw", "Method", "MethodOptions", "Order", "Scorer", "find_method", "method_names", "register"]
