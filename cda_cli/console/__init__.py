"""All that a person sees: tables, heat maps, and live progress, or plain lines off a terminal. Machines get JSON."""

from cda_cli.console.base import print_json, progress, progress_in_turn, shows_progress
from cda_cli.console.comparison import comparison_verdict, show_comparison
from cda_cli.console.comparison_page import comparison_page
from cda_cli.console.decoding import show_decode_speed
from cda_cli.console.effects import show_effects
from cda_cli.console.evaluation import show_evaluation
from cda_cli.console.inspection import show_report
from cda_cli.console.reports import (
    show_doctor,
    show_dry_run,
    show_export,
    show_forecast,
    show_import,
)
from cda_cli.console.runs import show_runs
from cda_cli.console.sample_editor import (
    next_line,
    show_drawing,
    show_editor_help,
    show_growing,
    show_keys,
    show_last_lines,
    show_last_tokens,
    show_probabilities,
)
from cda_cli.console.sampling import SampleDocument, SampleLines, SampleText, show_sampling
from cda_cli.console.settings import show_changed, show_presets, show_settings
from cda_cli.console.sweep import SweepDisplay, show_sweep, sweep_markdown
from cda_cli.console.tasks import show_task_list, show_tasks
from cda_cli.console.text import note
from cda_cli.console.training import TrainingDisplay

__all__ = [
    "SampleDocument",
    "SampleLines",
    "SampleText",
    "SweepDisplay",
    "TrainingDisplay",
    "comparison_page",
    "comparison_verdict",
    "next_line",
    "note",
    "print_json",
    "progress",
    "progress_in_turn",
    "show_changed",
    "show_comparison",
    "show_decode_speed",
    "show_doctor",
    "show_drawing",
    "show_dry_run",
    "show_editor_help",
    "show_effects",
    "show_evaluation",
    "show_export",
    "show_forecast",
    "show_growing",
    "show_import",
    "show_keys",
    "show_last_lines",
    "show_last_tokens",
    "show_presets",
    "show_probabilities",
    "show_report",
    "show_runs",
    "show_sampling",
    "show_settings",
    "show_sweep",
    "show_task_list",
    "show_tasks",
    "shows_progress",
    "sweep_markdown",
]
