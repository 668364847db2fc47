"""Creates shards (:mod:`contnet.data.datasets.shards`) from a folder of labelled images.

They are for file systems that are slow with many small files.

The bytes of the images are unchanged. Their order is shuffled with a fixed seed, so that readers of
whole shards get images of all classes. The shards' folder also has ``classes.txt``, ``index.npz``
and ``shards.json``, which records what the shards were made from and the number of images.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from contnet.data.datasets.classification import ClassificationSet, ClassificationSource, read_set
from contnet.data.datasets.shards import (
    CLASSES_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    SHARD_ENDING,
    Shard,
    index_shard,
    read_manifest,
    write_index,
)
from contnet.data.findings import ERROR, Findings
from contnet.utils.cpus import available_cpus
from contnet.utils.errors import UserError
from contnet.utils.files import TEMPORARY_SUFFIX, atomic_write, open_regular
from contnet.utils.pools import process_pool

__all__ = ["SAMPLES_PER_SHARD", "make_shards"]

SAMPLES_PER_SHARD = 5000  # about 550 MB of ImageNet
_SEED = 0


@dataclass(frozen=True)
class _Sample:
    path: str
    key: str
    label: int


@dataclass(frozen=True)
class _Plan:
    """A shard to create."""

    path: str
    samples: list[_Sample]


def _read_source(folder: Path) -> ClassificationSet:
    home = folder.resolve().parent
    source = ClassificationSource(str(folder))
    if folder.resolve().name == "val":
        source = ClassificationSource(str(folder), home=str(home), train_dir=str(home / "train"))
    findings = Findings()
    content = read_set(source, findings)
    if errors := findings.lines(ERROR):
        raise UserError(errors[0])
    if "offset" in content.records[0]:
        raise UserError(f"{folder} already contains shards")
    return content


def _samples(records: Sequence[dict]) -> list[_Sample]:
    """Returns samples whose keys are paths without extensions and, as WebDataset requires, dots."""
    used: set[str] = set()
    samples = []
    for record in records:
        folder, name = os.path.split(record["image_id"])
        key = os.path.join(folder, os.path.splitext(name)[0].replace(".", "_"))
        while key in used:
            key += "_"
        used.add(key)
        samples.append(_Sample(record["file_name"], key, record["label"]))
    return samples


def _stamp(content: ClassificationSet, samples_per_shard: int) -> dict:
    digest = hashlib.sha256()
    for record in content.records:
        digest.update(os.fsencode(f"{record['label']} {record['image_id']}\0"))
    digest.update(os.fsencode("\0".join(content.classes)))
    return {
        "images": len(content.records),
        "samples_per_shard": samples_per_shard,
        "seed": _SEED,
        "sha256_of_names": digest.hexdigest(),
    }


def _claim(target: Path, stamp: dict, names: Sequence[str]) -> None:
    """Creates the target folder, or continues in one with the same stamp."""
    target.mkdir(parents=True, exist_ok=True)
    present = sorted(os.listdir(target))
    begun = read_manifest(str(target)) if MANIFEST_FILE in present else None
    if begun is not None and begun != stamp:
        differing = ", ".join(key for key in stamp if begun.get(key) != stamp[key])
        raise UserError(
            f"{target} contains shards of other images or options ({differing}): use an empty "
            "folder"
        )
    ours = {MANIFEST_FILE, CLASSES_FILE, INDEX_FILE, *names}
    others = [
        name
        for name in present
        if name.removesuffix(TEMPORARY_SUFFIX) not in ours and not name.startswith(INDEX_FILE)
    ]
    if others or (begun is None and set(present) - {MANIFEST_FILE + TEMPORARY_SUFFIX}):
        name = (others or present)[0]
        raise UserError(f"{target} contains other files, such as {name}: use an empty folder")
    if begun is None:
        with atomic_write(target / MANIFEST_FILE, "w") as file:
            json.dump(stamp, file, indent=1)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _is_kept(shard: Shard, plan: _Plan) -> bool:
    """Whether a shard has the planned samples, and their files have not changed since."""
    planned = [(sample.key, sample.label) for sample in plan.samples]
    if list(zip(shard.keys, shard.labels.tolist(), strict=True)) != planned:
        return False
    for sample, length in zip(plan.samples, shard.lengths.tolist(), strict=True):
        status = os.stat(sample.path)
        # A copied file may keep its old modification time, but not its change time.
        if status.st_size != length or status.st_ctime_ns > shard.mtime:
            return False
    return True


def _existing(plan: _Plan) -> Shard | None:
    """Returns the shard if it exists and need not be created again."""
    if not os.path.exists(plan.path):
        return None
    try:
        shard = index_shard(plan.path)
    except UserError:
        return None  # damaged
    return shard if _is_kept(shard, plan) else None


def _make(plan: _Plan) -> tuple[Shard, bool]:
    """Creates a shard unless it exists; returns its index, and whether it was created."""
    try:
        if (shard := _existing(plan)) is not None:
            return shard, False
        with (
            atomic_write(plan.path) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for sample in plan.samples:
                ending = os.path.splitext(sample.path)[1].lower()
                with open_regular(sample.path) as image:
                    _add(tar, sample.key + ending, image.read())
                _add(tar, f"{sample.key}.cls", str(sample.label).encode())
    except OSError as error:
        what = error.filename or plan.path
        raise UserError(f"{what}: {error.strerror}; fix it and run this again") from error
    return index_shard(plan.path), True


def _plans(content: ClassificationSet, target: Path, samples_per_shard: int) -> list[_Plan]:
    samples = _samples(content.records)
    order = np.random.default_rng(_SEED).permutation(len(samples))
    shuffled = [samples[i] for i in order]
    starts = range(0, len(shuffled), samples_per_shard)
    name = target.resolve().name
    return [
        _Plan(
            str(target / f"{name}-{number:06d}{SHARD_ENDING}"),
            shuffled[start : start + samples_per_shard],
        )
        for number, start in enumerate(starts)
    ]


def make_shards(
    source: Path,
    target: Path,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    workers: int | None = None,
) -> tuple[int, int]:
    """Creates shards that are missing or whose images have changed; others are kept.

    Args:
        source: class folders; or a flat folder called ``val`` with its label file and training set
            beside it.
        target: empty folder, or that of an interrupted run with the same images and options.
        samples_per_shard: images per shard; the last one has the rest.
        workers: number of processes; None for the number of cores.

    Returns:
        The number of shards created, and of shards kept.

    Raises:
        UserError: if the source cannot be used, the target has other content, or files cannot be
            read or written.
    """
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise UserError(f"{target} is inside {source}: use a folder outside")
    content = _read_source(source)
    plans = _plans(content, target, samples_per_shard)
    try:
        names = [os.path.basename(plan.path) for plan in plans]
        _claim(target, _stamp(content, samples_per_shard), names)
        with atomic_write(target / CLASSES_FILE) as file:
            file.write(os.fsencode("".join(f"{name}\n" for name in content.classes)))
        made = _make_all(plans, workers)
        write_index(target, [shard for shard, _ in made])
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror})") from error
    count = sum(new for _, new in made)
    return count, len(made) - count


def _make_all(plans: Sequence[_Plan], workers: int | None) -> list[tuple[Shard, bool]]:
    total = sum(len(plan.samples) for plan in plans)
    made = []
    with (
        process_pool(workers or available_cpus()) as pool,
        tqdm(total=total, unit="image", desc="shards") as bar,
    ):
        try:
            for result in pool.map(_make, plans):
                made.append(result)
                bar.update(len(result[0].keys))
        except BrokenProcessPool as error:
            raise UserError(
                "a process was killed, perhaps out of memory: run this again with fewer "
                "--workers, it continues where it stopped"
            ) from error
    return made
