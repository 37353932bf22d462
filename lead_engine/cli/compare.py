"""`lead-engine compare`: a study, and then its report."""

from __future__ import annotations

from lead_engine import report
from lead_engine.config import CompareConfig, ReportConfig
from lead_engine.study.compare import run_study


def run(config: CompareConfig) -> None:
    """Make the runs that are missing, write OUT/results.json and OUT/results.md, and plots in OUT/report/.

    Raises UserError for a study that cannot be read, for runs made with other options, and for a run that fails.
    """
    run_study(config)
    report.run(ReportConfig(runs=(config.out,), out=config.out / "report"))
