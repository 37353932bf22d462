"""Hugging Face models as the engine trains and scores them: loading, packing, sharding, saving."""
from transformers.utils import logging

logging.disable_progress_bar()  # the engine shows its own; theirs write control codes into logs
