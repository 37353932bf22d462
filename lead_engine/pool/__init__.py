"""From instruction files to tokens, and what is known of every sample.

What a record becomes, and what holds all of them:

    class          holds                                             how much            where it lives
    Record         one conversation: messages, tools, where from     one sample          Python, while it is read
    Rendered       its text by the chat template, spans of answers   one sample          Python, while it is tokenised
    Sample         its token ids and response mask, and the record   one sample          Python, while it is tokenised
    TokenStore     tokens, response masks, bounds of all samples     [total], [N + 1]    POOL/store: device, host, disk
    PoolState      utility, difficulty, cluster, task, ... of all    vectors [N]         POOL/state.*: CPU
    RecordIds      the ids that users gave their records             [N] text            POOL/records.parquet: CPU
    HeldOutData    a TokenStore of held-out records, and their tasks n samples           RUN/heldout: as a TokenStore

(`evaluation.outputs.Samples` are the losses of one model on held-out records.)

In the order of the data:

    sources, readers/, fields, forms, turns, message, records, problems   files to records, and what is wrong with them
    tokenizer, chat_template, special_tokens, end_of_turn                 the tokenizer and its template
    marks, frames, locating, rendering, template                          records to tokens and response masks
    store_files, store, prefetch, state, record_ids, heldout              what is kept
    identity                                                              fingerprints of all of it
    procedural/                                                           a made-up pool (lead-engine make-pool)
"""
