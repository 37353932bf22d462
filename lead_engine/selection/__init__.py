"""Who is trained next: a bandit over difficulty clusters, a ranking inside them, and the utility behind both.

Four things describe a pool's samples. They differ in where they live and in what changes them:

    name          room       holds, for N samples                         lives on             changes
    TokenStore    pool       tokens, response mask, offsets; packs them   disk, host, device   never
    PoolState     pool       what `prepare` found: U, difficulty,         disk, host           never
                             cluster, task, dropped
    SampleNames   pool       the records' ids, for logs and messages      host, as Arrow       never
    Samples       selection  the vectors a selection works on: those of   device               every step: U, visits,
                             PoolState it needs, lengths, visits, barred                       barred

A `Selector` makes Samples from a TokenStore's lengths and a PoolState; only Samples is in a checkpoint.
"""
