"""Many runs compared: which runs a study has, starting them, paired statistics, tables.

variants.py    the study's YAML: named settings to compare
plan.py        the runs that it takes: folder, configuration, command lines
compare.py     the command `compare`: makes the missing runs, then writes and prints the result
jobs.py        several tasks at a time, each a series of child processes
launch.py      one child process: its start, its log, its end
outcome.py     a finished run: what it cost and what it reached
contrasts.py   two variants against each other: paired intervals and verdicts
results.py     all of it as results.json
tables.py      results.json as tables, on the console and in results.md
"""
