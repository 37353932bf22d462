"""LEAD inside Hugging Face's `Trainer` and TRL's `SFTTrainer`, by three lines in the user's script.

    from lead_engine.integrations import lead
    selection = lead(pool="PREPARED", budget=0.025)        # without a pool, the trainer's own rows are scored first
    trainer = selection.trainer(SFTTrainer)(model=..., args=..., train_dataset=...)

docs/API.md describes what follows from it. Needs transformers 5.19 or later; `datasets` where a pool's tokens are the
data set; TRL only for its trainer. Tested with transformers 5.23, TRL 1.16, peft 0.21, accelerate 1.15, datasets 5.2.
"""

from __future__ import annotations

from lead_engine.integrations.selection import Selection, lead

__all__ = ["Selection", "lead"]
