"""Training: the loop (trainer.py), what builds it (build.py), what surrounds it (train.py, callbacks.py)."""
