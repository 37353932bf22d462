"""Plots and one stand-alone HTML page from run folders."""

from lead_engine.report.write import run

__all__ = ["run"]
