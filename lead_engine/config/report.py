"""`lead-engine report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lead_engine.config.options import Options


@dataclass(frozen=True)
class ReportConfig(Options):
    """Plots and one stand-alone HTML page from run folders."""

    runs: tuple[Path, ...]
    """Run folders."""
    out: Path
    """Folder to write."""
