"""`lead-engine prepare`: from instruction files and a base model to a prepared pool."""

from lead_engine.prepare.pipeline import run

__all__ = ["run"]
