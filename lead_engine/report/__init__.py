"""`lead-engine report`: plots and one stand-alone HTML page from run folders.

runs.py               reads run folders, and what `compare` wrote
comparable.py         whether evaluations are of the same records
training_plots.py     one run: loss, learning rate, held-out loss
heldout_curve.py      one run: held-out loss while it trained
selection_plots.py    one run: what it selected
budget_plots.py       many runs: held-out loss by budget
comparison_plots.py   many runs: training loss, tasks, time
difference_plots.py   many runs: paired differences, from a study's results
page.py, style.py     the HTML page; colours and sizes
write.py              the command
"""

from lead_engine.report.write import run

__all__ = ["run"]
