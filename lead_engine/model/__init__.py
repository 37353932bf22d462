"""Hugging Face models as the engine trains and scores them: loading, packing, sharding, saving."""

from transformers.utils import logging

from lead_engine.model.bnb import quieten

quieten()  # before peft, which imports bitsandbytes
logging.disable_progress_bar()  # the engine shows its own; theirs write control codes into logs
