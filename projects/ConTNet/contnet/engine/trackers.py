"""Experiment trackers: TRACKERS sends a run's metrics and pictures to Weights & Biases or MLflow.

The trackers' own environment variables and logins set addresses, projects, experiments and keys.
``trackers.json`` in the run's folder stores the tracker's id of the run and the last iteration
sent, so that a resumed run continues it and sends no iteration twice. The metrics are those of
``metrics.json``; metrics that a tracker has missed are sent when the run is resumed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter, get_event_storage

from contnet.config.nodes import flatten
from contnet.engine.hooks import is_due
from contnet.engine.writers import read_metrics
from contnet.utils.addresses import redact
from contnet.utils.errors import UserError
from contnet.utils.files import NO_GUARD, WriteGuard, atomic_write
from contnet.utils.records import recover_record

__all__ = [
    "TRACKERS",
    "TRACKERS_FILE",
    "TrackedRun",
    "Tracker",
    "TrackerPictures",
    "TrackerWriter",
    "build_trackers",
    "check_trackers",
]

TRACKERS_FILE = "trackers.json"

logger = logging.getLogger(__name__)


class _RunState(TypedDict, total=False):
    run: str
    metrics: int
    pictures: int


class _State(TypedDict, total=False):
    """The content of trackers.json."""

    config: str
    runs: dict[str, _RunState]


class Tracker(ABC):
    """The interface to one run of a tracker, new or continued.

    Attributes:
        package: the package that must be installed.
        run: the tracker's id of the run.
    """

    package: str
    run: str

    @abstractmethod
    def __init__(self, run: str, name: str, folder: str, settings: Mapping[str, str]):
        """Starts or continues a run.

        Args:
            run: the id of the run to continue; "" for a new one.
            name: name of a new run.
            folder: the run's folder, for files of the tracker.
            settings: the config, by dotted keys.
        """

    @abstractmethod
    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Sends the metrics of an iteration; iterations are in ascending order."""

    @abstractmethod
    def log_pictures(self, iteration: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Sends pictures by name, uint8 RGB (H, W, 3)."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """Ends the run as finished or interrupted."""


class WandbTracker(Tracker):
    """A run of Weights & Biases."""

    package = "wandb"

    def __init__(self, run: str, name: str, folder: str, settings: Mapping[str, str]):
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            id=run or None,
            resume="allow" if run else None,
            name=name,
            dir=folder,
            config=dict(settings),
            # Send no code, commands, addresses or terminal output.
            settings=wandb.Settings(
                console="off", disable_code=True, disable_git=True, silent=True, x_disable_meta=True
            ),
        )
        self.run = self._run.id

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration, commit=True)

    def log_pictures(self, iteration: int, pictures: Mapping[str, np.ndarray]) -> None:
        images = [self._image(picture, caption=name) for name, picture in pictures.items()]
        self._run.log({"predictions": images}, step=iteration, commit=False)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MlflowTracker(Tracker):
    """A run of MLflow."""

    package = "mlflow"
    _MOST = 100  # maximum number of settings per request
    _LONGEST = 500  # maximum number of characters of a setting on all servers

    def __init__(self, run: str, name: str, folder: str, settings: Mapping[str, str]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient()
        if run:
            self._client.update_run(run, status="RUNNING")
            self.run = run
            return
        self.run = self._client.create_run(self._experiment(), run_name=name).info.run_id
        params = [Param(key, value[: self._LONGEST]) for key, value in settings.items()]
        for start in range(0, len(params), self._MOST):
            self._client.log_batch(self.run, params=params[start : start + self._MOST])

    def _experiment(self) -> str:
        if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return number
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        if found := self._client.get_experiment_by_name(name):
            return found.experiment_id
        return self._client.create_experiment(name)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [
            self._metric(_as_mlflow_name(key), value, now, iteration)
            for key, value in values.items()
        ]
        self._client.log_batch(self.run, metrics=metrics)

    def log_pictures(self, iteration: int, pictures: Mapping[str, np.ndarray]) -> None:
        for number, picture in enumerate(pictures.values()):
            self._client.log_image(self.run, picture, key=f"prediction_{number}", step=iteration)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.run, "FINISHED" if finished else "KILLED")


def _as_mlflow_name(key: str) -> str:
    """A metric's name, with only the characters that MLflow accepts."""
    return re.sub(r"[^\w\-. :/]", "_", key)


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def _in_one_line(error: Exception) -> str:
    return redact(" ".join(str(error).split()))[:300] or type(error).__name__


class TrackedRun:
    """A run of a tracker, to which each iteration is sent once.

    Args:
        name: a key of ``TRACKERS``.
        cfg: the config.
        state: the tracker's entry in trackers.json: its run and the last iterations sent.
        save: writes trackers.json.

    Raises:
        UserError: if the tracker cannot start.
    """

    def __init__(self, name: str, cfg: CfgNode, state: dict, save: Callable[[], None]):
        self._name = name
        self._state = state
        self._save = save
        self._failed = False
        folder = cfg.OUTPUT_DIR
        settings = {key: redact(str(value)) for key, value in flatten(cfg, cfg)}
        try:
            self._tracker = TRACKERS[name](
                state.get("run", ""), Path(folder).resolve().name, folder, settings
            )
        except Exception as error:  # MLflow raises several types
            raise UserError(
                f"TRACKERS {name} cannot start ({_in_one_line(error)}): see "
                "docs/training.md for its environment variables, or remove it"
            ) from error
        state["run"] = self._tracker.run
        save()

    def send_metrics(self, iteration: int, values: Mapping[str, float]) -> None:
        """Sends the metrics of an iteration, unless it or a later one has been sent."""
        self._send("metrics", self._tracker.log, iteration, values)

    def send_pictures(self, iteration: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Sends pictures by name, unless those of the iteration or a later one have been sent."""
        self._send("pictures", self._tracker.log_pictures, iteration, pictures)

    def _send(self, what: str, send: Callable, iteration: int, values: Mapping) -> None:
        last = self._state.get(what, -1)
        if self._failed or iteration <= last:
            return
        # Saved before sending, since the process may be killed in between: an iteration sent twice
        # would be worse than a missing one.
        self._state[what] = iteration
        self._save()
        try:
            send(iteration, values)
        except Exception as error:  # MLflow raises several types
            self._state[what] = last
            self._save()
            self._failed = True
            logger.warning(
                f"TRACKERS {self._name} fails ({_in_one_line(error)}): training continues without "
                "it and sends the missing metrics when it is resumed"
            )

    def close(self, finished: bool) -> None:
        """Ends the tracker's run as finished or interrupted."""
        try:
            self._tracker.close(finished)
        except Exception as error:  # MLflow raises several types
            logger.warning(f"TRACKERS {self._name} could not be closed ({_in_one_line(error)})")


class TrackerWriter(EventWriter):
    """Sends the metrics of metrics.json, beginning with those already in the file.

    Args:
        runs: runs to send to.
        output_dir: the run's folder.
    """

    def __init__(self, runs: Sequence[TrackedRun], output_dir: str):
        self._runs = runs
        self._last = -1
        self._send(
            (line["iteration"], key, value)
            for line in read_metrics(output_dir)
            for key, value in line.items()
            if key != "iteration"
        )

    def write(self) -> None:
        latest = get_event_storage().latest_with_smoothing_hint(window_size=1)
        self._send((iteration, key, float(value)) for key, (value, iteration) in latest.items())

    def _send(self, values: Iterable[tuple[int, str, float]]) -> None:
        """Sends the (iteration, key, value) tuples that are later than the last iteration sent."""
        rows: dict[int, dict[str, float]] = {}
        for iteration, key, value in values:
            if iteration > self._last:
                rows.setdefault(iteration, {})[key] = value
        for iteration in sorted(rows):
            for run in self._runs:
                run.send_metrics(iteration, rows[iteration])
            self._last = iteration


class TrackerPictures(HookBase):
    """Sends predictions after each evaluation, before its metrics, and ends the trackers' runs.

    Args:
        runs: runs to send to; only the main process has any.
        period: evaluation period in iterations.
        function: draws the predictions, by name.
    """

    def __init__(
        self,
        runs: Sequence[TrackedRun],
        period: int,
        function: Callable[[], dict[str, np.ndarray]],
    ):
        self._runs = runs
        self._period = period
        self._function = function

    def after_step(self) -> None:
        trainer = self.trainer
        if self._runs and is_due(trainer.iter, self._period, trainer.max_iter):
            pictures = self._function()
            for run in self._runs:
                run.send_pictures(trainer.iter, pictures)

    def after_train(self) -> None:
        for run in self._runs:
            run.close(finished=self.trainer.iter >= self.trainer.max_iter)


def check_trackers(cfg: CfgNode) -> None:
    """Checks that the packages of TRACKERS are installed.

    Raises:
        UserError: if one is missing.
    """
    for name in cfg.TRACKERS:
        if importlib.util.find_spec(TRACKERS[name].package) is None:
            raise UserError(
                f"TRACKERS {name} is not installed: pip install 'contnet[trackers]', or leave it "
                "out"
            )


def build_trackers(cfg: CfgNode, start_iter: int, guard: WriteGuard = NO_GUARD) -> list[TrackedRun]:
    """Starts the runs of TRACKERS, or continues those of trackers.json.

    Training from the beginning with a different config starts a new run.

    Args:
        cfg: the config.
        start_iter: the first iteration of this attempt.
        guard: see :func:`contnet.utils.files.atomic_write`.

    Raises:
        UserError: if a tracker cannot start.
    """
    path = Path(cfg.OUTPUT_DIR, TRACKERS_FILE)
    config = hashlib.sha256(cfg.dump().encode()).hexdigest()
    state = recover_record(path, _State) or {}
    if not start_iter and state.get("config") != config:
        state = {}
    state.setdefault("config", config)
    runs = state.setdefault("runs", {})

    def save() -> None:
        with atomic_write(path, "w", guard) as file:
            json.dump(state, file, indent=1)

    return [TrackedRun(name, cfg, runs.setdefault(name, {}), save) for name in cfg.TRACKERS]
