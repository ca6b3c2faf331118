"""Numbers that are looked at: the run's own record first, then the places that show it.

`treadle.track.wandb` is the only importer of wandb and is not imported from here.
"""

from treadle.track.catalogue import Direction, Metric, catalogue, evaluation_names, headline_name
from treadle.track.log import History, Lines, NullTracker, RunTracker, Sink, Tracker, now_s, read_metrics
from treadle.track.report import Example, LabelScore, ReportInput, render_report
from treadle.track.terminal import Progress, chart, sparkline, table

__all__ = [
    "Direction",
    "Example",
    "History",
    "LabelScore",
    "Lines",
    "Metric",
    "NullTracker",
    "Progress",
    "ReportInput",
    "RunTracker",
    "Sink",
    "Tracker",
    "catalogue",
    "chart",
    "evaluation_names",
    "headline_name",
    "now_s",
    "read_metrics",
    "render_report",
    "sparkline",
    "table",
]
