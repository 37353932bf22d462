"""A small made-up world as an instruction pool: data for the quickstart and the tests that needs no network.

`make_pool` writes three files, wholly determined by its arguments:

- pool.jsonl: records with id, dataset (the task), instruction, input, output, and two fields which the engine never
  reads: level (0 to 3, the difficulty within the task) and note ("", "wrong_answer" or "near_duplicate").
- heldout.jsonl: the same form, all answers right, no near-duplicates. No question of it, in whatever wording, occurs in
  the pool.
- text.txt: text of the same world to pre-train on, a paragraph a line: what the people in it are like, examples of the
  tasks in prose, and questions with their answers. Nothing that a held-out question asks occurs there as an example or
  a question. Facts about people do, in prose, since nobody could know them otherwise.

Tasks: arithmetic (sums, differences), sequences (next number, largest, comparison), strings (reverse, capitals,
counting, first letters), sorting (words, numbers), facts (people of the world; level 3 takes two steps), units
(conversion), formatting (copying, lists, records). Of the pool's records, by default, 8 % have a wrong answer, 15 % are
near-duplicates (another record with small changes of wording), and 8 % are trivial (level 0: the answer stands in the
question). The shares are exact up to rounding.

How hard it is: a Llama of 0.9M parameters with a vocabulary of 1,024, pre-trained on three passes of the text (490k
tokens, a minute of one CPU core), has a loss of 6.6 nats per response token on the pool; tuned on the pool once, it has
1.4 on the held-out records (arithmetic 0.9, units 1.2, formatting 1.3, facts and sequences 1.5, sorting 1.6, strings
3.4). It hardly ever gives a whole answer right; that takes longer training.
"""

from lead_engine.pool.procedural.make import make_pool, run

__all__ = ["make_pool", "run"]
