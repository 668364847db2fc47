"""Complete configs of jobs, written as in a submission."""

from collections.abc import Sequence
from pathlib import Path

from contnet.launch.arguments import build_run_settings, parse_arguments

__all__ = ["write_config"]


def write_config(argv: Sequence[str], file: Path) -> dict[str, object]:
    """Writes the config of a train_net.py command line; returns a TrainingJob's arguments."""
    settings = build_run_settings(parse_arguments(argv))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(settings.cfg.dump())
    return {
        "config_file": str(file),
        "run_folder": settings.cfg.OUTPUT_DIR,
        "num_gpus": settings.processes.num_gpus,
        "resume": settings.resume,
        "eval_only": settings.eval_only,
        "notes": settings.notes,
    }
