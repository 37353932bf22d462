"""Who is trained next: one method a file, all behind the small interface of `base.py`."""

from lead_engine.selection.methods.base import Draw, Method, Order, Scorer
from lead_engine.selection.methods.full import Full
from lead_engine.selection.methods.ifd import Ifd
from lead_engine.selection.methods.iterit import Iterit
from lead_engine.selection.methods.lead import Lead
from lead_engine.selection.methods.loss import Loss
from lead_engine.selection.methods.random import Random
from lead_engine.selection.methods.random_matched import RandomMatched
from lead_engine.selection.methods.rescore import Rescore

METHODS: dict[str, type[Method]] = {
    "lead": Lead,
    "iterit": Iterit,
    "rescore": Rescore,
    "loss": Loss,
    "ifd": Ifd,
    "random": Random,
    "random-matched": RandomMatched,
    "full": Full,
}
"""The names of `--method`."""

__all__ = ["METHODS", "Draw", "Method", "Order", "Scorer"]
