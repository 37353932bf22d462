"""From instruction files to tokens: records, chat template, tokenizer, token store, and the per-sample state
vectors.
"""
