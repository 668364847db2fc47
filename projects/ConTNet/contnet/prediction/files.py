"""Runs a model on a command's files, in all of its processes, and writes the predictions."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from contnet.data.pipeline.images import UnreadableFile, read_pixels
from contnet.data.pipeline.loader import init_worker
from contnet.evaluation.drawing import draw_prediction
from contnet.prediction.inputs import Input, Inputs
from contnet.prediction.outputs import (
    category_ids,
    result_rows,
    save_map,
    save_picture,
    write_contact_sheet,
    write_results,
)
from contnet.prediction.predictor import Predictor, load_run
from contnet.prediction.tiles import check_tiles, predict_tiled
from contnet.report.page import Thumbnail
from contnet.utils.errors import UsageError, UserError
from contnet.utils.files import explaining_disk, writing
from contnet.utils.text import first_names, nearest, plural, printable, say

__all__ = ["PredictionSettings", "predict_files"]

_UNREADABLE = "unreadable"
_CODEC = "mp4v"
_FRAMES_PER_SECOND = 25.0  # for a video that does not specify its frame rate
_WHOLE = 0.9  # minimum share of a video's frames that must be readable


@dataclass(frozen=True)
class PredictionSettings:
    """Model, inputs and outputs of a prediction.

    Attributes:
        source, config_file, device: as in :func:`contnet.prediction.predictor.load_run`.
        inputs: the files.
        output: output folder.
        score: minimum score of a detection.
        classes: names of the classes to keep; empty for all.
        batch_size: number of images per forward pass.
        tile: size and overlap of tiles in pixels; None for no tiles.
        workers: number of decoding processes, for each predicting process.
        pictures: whether to draw the predictions.
    """

    source: str
    inputs: Inputs
    output: Path
    config_file: str = ""
    device: str = ""
    score: float = 0.5
    classes: Sequence[str] = ()
    batch_size: int = 1
    tile: tuple[int, int] | None = None
    workers: int = 0
    pictures: bool = True


class _Outcome(NamedTuple):
    """The result of one file."""

    file: Input
    rows: Sequence[dict] = ()
    thumbnails: Sequence[Thumbnail] = ()
    images: int = 0
    unreadable: str = ""


class _Decoded(Dataset):
    """A data set of model inputs, which marks files that cannot be read."""

    def __init__(self, files: Sequence[Input], model: Predictor):
        self.files = files
        self.mapper = model.mapper

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        file = self.files[index]
        try:
            return {**self.mapper({"file_name": file.path}), "input": file}
        except UnreadableFile as error:
            return {"input": file, _UNREADABLE: str(error)}


class _Share:
    """Predicts the files of one process."""

    def __init__(self, settings: PredictionSettings, model: Predictor):
        self.settings = settings
        self.model = model
        self.ids = _ids(settings, model)

    def predict(self, files: Sequence[Input]) -> Iterator[_Outcome]:
        """Yields the result of each file, in any order, after drawing it."""
        images = [file for file in files if not file.is_video]
        yield from self._tiled(images) if self.settings.tile else self._batches(images)
        for video in (file for file in files if file.is_video):
            yield self._video(video)

    def _batches(self, files: Sequence[Input]) -> Iterator[_Outcome]:
        loader = DataLoader(
            _Decoded(files, self.model),
            batch_size=self.settings.batch_size,
            num_workers=min(self.settings.workers, len(files)),
            collate_fn=list,
            worker_init_fn=init_worker,
        )
        for batch in loader:
            readable = [each for each in batch if _UNREADABLE not in each]
            for each in batch:
                if _UNREADABLE in each:
                    yield _Outcome(each["input"], unreadable=each[_UNREADABLE])
            found = self.model.infer(readable, self.settings.score) if readable else []
            for each, prediction in zip(readable, found, strict=True):
                file = each["input"]
                image = self._pixels(file) if self.settings.pictures else None
                yield self._outcome(file, self._kept(prediction), image)

    def _pixels(self, file: Input) -> np.ndarray:
        return read_pixels({"file_name": file.path}, "RGB", self.model.cfg.INPUT.MAX_PIXELS)

    def _tiled(self, files: Sequence[Input]) -> Iterator[_Outcome]:
        for file in files:
            try:
                image = self._pixels(file)
            except UnreadableFile as error:
                yield _Outcome(file, unreadable=str(error))
                continue
            shown = image if self.settings.pictures else None
            yield self._outcome(file, self._find(image), shown)

    def _find(self, image: np.ndarray) -> dict:
        if self.settings.tile:
            found = predict_tiled(self.model, image, *self.settings.tile, self.settings.score)
        else:
            found = self.model(image, score=self.settings.score)
        return self._kept(found)

    def _kept(self, found: dict) -> dict:
        """Keeps only the predictions of ``classes``."""
        if not self.settings.classes or "boxes" not in found:
            return found
        wanted = [
            index for index, name in enumerate(found["names"]) if name in self.settings.classes
        ]
        kept = {key: value[wanted] for key, value in found.items() if key != "names"}
        return {**kept, "names": [found["names"][index] for index in wanted]}

    def _rows(self, image_id: int | str, name: str, found: dict) -> list[dict]:
        return result_rows(image_id, name, found, self.model.class_names, self.ids)

    def _outcome(self, file: Input, found: dict, image: np.ndarray | None) -> _Outcome:
        output, thumbnails = self.settings.output, []
        if "semantic" in found:
            save_map(output, file.name, found)
        if image is not None:
            drawn = draw_prediction(image, found, self.model.class_names)
            thumbnails.append(save_picture(output, file, drawn, _caption(found)))
        return _Outcome(file, self._rows(file.image_id, file.name, found), thumbnails, 1)

    def _video(self, file: Input) -> _Outcome:
        rows: list[dict] = []
        number = 0
        source = cv2.VideoCapture(file.path)
        length = source.get(cv2.CAP_PROP_FRAME_COUNT)
        path = self.settings.output / "videos" / f"{file.name}.mp4"
        writer = None
        try:
            while (frame := _next_frame(source)) is not None:
                name = f"{file.name}_{number:06d}"
                found = self._find(frame)
                if "semantic" in found:
                    save_map(self.settings.output, name, found)
                rows += self._rows(f"{file.image_id}#{number}", name, found)
                if self.settings.pictures:
                    drawn = draw_prediction(frame, found, self.model.class_names)
                    writer = writer or _video_writer(path, source, drawn.shape)
                    writer.write(np.ascontiguousarray(drawn[..., ::-1]))
                number += 1
        finally:
            source.release()
            if writer is not None:
                writer.release()
        unreadable = ""
        if not number:
            unreadable = f"the video {file.path} cannot be read"
        elif number < _WHOLE * length:  # an estimate in some files
            unreadable = f"the video {file.path} can be read up to frame {number} of {length:.0f}"
        return _Outcome(file, rows, (), number, unreadable)


def _next_frame(source: cv2.VideoCapture) -> np.ndarray | None:
    there, frame = source.read()
    return np.ascontiguousarray(frame[..., ::-1]) if there else None


def _video_writer(path: Path, source: cv2.VideoCapture, shape: tuple) -> cv2.VideoWriter:
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = source.get(cv2.CAP_PROP_FPS) or _FRAMES_PER_SECOND
    code = cv2.VideoWriter.fourcc(*_CODEC)
    writer = cv2.VideoWriter(str(path), code, rate, (shape[1], shape[0]))
    if not writer.isOpened():
        raise UserError(f"{path} cannot be written: OpenCV here has no encoder for {_CODEC}")
    return writer


def _caption(found: dict) -> str:
    """Returns a short summary of an image's predictions."""
    if "boxes" in found:
        counts = Counter(found["names"]).most_common(3)
        return ", ".join(f"{count} {name}" for name, count in counts) or "nothing"
    if "semantic" in found:
        return plural(len(np.unique(found["semantic"])), "class")
    return f"{found['names'][0]} {100 * found['scores'][0]:.0f}%"


def _ids(settings: PredictionSettings, model: Predictor) -> list[int]:
    """Checks the settings; returns the model's category ids in the results."""
    if settings.tile:
        check_tiles(model, *settings.tile)
    for name in settings.classes:
        if name not in model.class_names:
            raise UsageError(
                f"--classes has {name!r}, which {model.source} does not have; the nearest is "
                f"{nearest(name, model.class_names)!r}"
            )
    if settings.classes and model.task != "detection":
        raise UsageError(f"--classes is for detectors, but {model.source} is a {model.task} model")
    ids = category_ids(model.class_names, settings.inputs.categories)
    if ids is None:
        missing = [name for name in model.class_names if name not in settings.inputs.categories]
        raise UsageError(
            f"the categories of the COCO file lack classes of {model.source} "
            f"({first_names(missing)}): use a file with the categories of the training, "
            "or without categories"
        )
    return ids


def _own_device(device: str) -> str:
    """Returns the GPU of this process if there are several processes, otherwise ``device``."""
    if comm.get_world_size() > 1 and device == "cuda":
        return f"cuda:{torch.cuda.current_device()}"
    return device


def _write(
    settings: PredictionSettings, model: Predictor, outcomes: Sequence[_Outcome], seconds: float
) -> None:
    rows = [row for each in outcomes for row in each.rows]
    images = sum(each.images for each in outcomes)
    write_results(settings.output, rows)
    speed = f"{plural(images, 'image')} in {seconds:.1f} s, {images / seconds:.2f} images/s"
    say(f"{speed}, {plural(len(rows), 'result')}: {settings.output}")
    if thumbnails := [each for outcome in outcomes for each in outcome.thumbnails]:
        facts = {"model": model.source, "least score": settings.score, "speed": speed}
        page = write_contact_sheet(settings.output, "Predictions", facts, thumbnails)
        say(f"page {page}")
    if unreadable := [each.file.path for each in outcomes if each.unreadable]:
        raise UserError(
            f"{len(unreadable)} of {plural(len(outcomes), 'file')} could not be read completely: "
            f"{first_names(unreadable)}"
        )


def predict_files(settings: PredictionSettings) -> None:
    """Predicts this process's share of the files; the main process writes the results.

    Args:
        settings: model, inputs and outputs, the same in all processes.

    Raises:
        UserError: if the model cannot be loaded, or does not support the settings; at the end, if a
            file could not be read.
    """
    with writing(settings.output):  # fail before the model is loaded
        settings.output.mkdir(parents=True, exist_ok=True)
    with explaining_disk(settings.output):
        model = load_run(settings.source, settings.config_file, device=_own_device(settings.device))
        share, files = _Share(settings, model), settings.inputs.files
        own = files[comm.get_rank() :: comm.get_world_size()]
        begun, outcomes = time.monotonic(), []
        with tqdm(
            total=len(own), unit="file", disable=None if comm.is_main_process() else True
        ) as bar:
            for outcome in share.predict(own):
                outcomes.append(outcome)
                if outcome.unreadable:
                    bar.write(f"left out: {printable(outcome.unreadable)}", sys.stderr)
                bar.update()
        parts = comm.gather(outcomes)
        if comm.is_main_process():
            by_name = {each.file.name: each for part in parts for each in part}
            ordered = [by_name[file.name] for file in files]
            _write(settings, model, ordered, time.monotonic() - begun)
