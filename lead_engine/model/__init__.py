"""Hugging Face models as the engine trains and scores them: loading, packing, sharding, saving."""

from transformers.utils import logging

from lead_engine.model.bnb import quieten

quieten()  # before peft, which imports bitsandbytes
# The engine shows its own progress bars; transformers' write control codes into logs.
logging.disable_progress_bar()  # type: ignore[no-untyped-call]
