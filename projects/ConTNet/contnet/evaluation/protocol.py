"""How an evaluation was done, and whether its metrics are comparable with published ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

__all__ = ["SEE_WARNINGS", "dataset_digest", "describe_protocol"]

SEE_WARNINGS = "see the warnings"

_DETECTIONS = 100  # per image in COCO's AP
# Keys that locate an image in a shard.
_PLACES = ("offset", "size")
# By architecture, the config node of its inference thresholds, and Detectron2's default score
# threshold, which published metrics use.
_THRESHOLDS = {
    "GeneralizedRCNN": ("ROI_HEADS", 0.05),
    "RetinaNet": ("RETINANET", 0.05),
    "FCOS": ("FCOS", 0.2),
}


def dataset_digest(records: Iterable[dict]) -> str:
    """Returns the SHA-256 of a data set's image names, sizes and ground truth, but not pixels.

    Args:
        records: Detectron2's data set dicts. Folders in file names are ignored.
    """
    digest = hashlib.sha256()
    for record in records:
        content = {
            key: Path(value).name if key.endswith("file_name") else value
            for key, value in sorted(record.items())
            if key not in _PLACES
        }
        digest.update(msgspec.json.encode(content, enc_hook=str))
    return digest.hexdigest()


def describe_protocol(cfg: CfgNode, name: str, digest: str, warnings: Sequence[str]) -> dict:
    """Returns the entries of results.json about how a data set was evaluated.

    Args:
        cfg: the config; TEST, SOLVER and the model's thresholds are read.
        name: name of the data set.
        digest: the result of :func:`dataset_digest`.
        warnings: warnings about the metrics, one line each.

    Returns:
        ``standard``, whether the metrics are comparable with published ones of this data set;
        ``deviations``, why not, one line each; and ``protocol``, the settings.
    """
    solver, deviations = cfg.SOLVER, []
    protocol = {
        "dataset_sha256": digest,
        "precision": solver.AMP.DTYPE if solver.AMP.ENABLED else "float32",
    }
    if solver.AMP.ENABLED:
        deviations.append(f"computed in {solver.AMP.DTYPE}, not in float32")
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind in ("coco", "cityscapes_instance"):
        limit = protocol["detections_per_image"] = cfg.TEST.DETECTIONS_PER_IMAGE
        if limit != _DETECTIONS:
            deviations.append(f"{limit} detections of an image count, not {_DETECTIONS}")
        if cfg.MODEL.META_ARCHITECTURE in _THRESHOLDS:
            node, usual = _THRESHOLDS[cfg.MODEL.META_ARCHITECTURE]
            score = protocol["score_threshold"] = cfg.MODEL[node].SCORE_THRESH_TEST
            protocol["nms_threshold"] = cfg.MODEL[node].NMS_THRESH_TEST
            if score > usual:
                deviations.append(f"the score threshold is {score:g}, not {usual:g}")
    if warnings:
        deviations.append(SEE_WARNINGS)
    return {"standard": not deviations, "deviations": deviations, "protocol": protocol}
