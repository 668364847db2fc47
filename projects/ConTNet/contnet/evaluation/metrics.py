"""Names of metrics before an evaluation, and the main metric after it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from contnet.evaluation.classification import top_ks
from contnet.evaluation.coco import coco_class_names, coco_metrics, coco_tasks
from contnet.utils.errors import UsageError
from contnet.utils.text import printable

__all__ = ["MAIN_METRICS", "check_best_metric", "main_metric"]

# A data set's main metric is the first of these that its evaluators return.
MAIN_METRICS = (
    "cityscapes/AP",
    "segm/AP",
    "bbox/AP",
    "sem_seg/IoU",
    "sem_seg/mIoU",
    "classification/top1",
)


def _coco_metrics(cfg: CfgNode, name: str) -> set[str]:
    things = coco_class_names(name)
    metrics = coco_metrics(cfg.TEST.DETECTIONS_PER_IMAGE)
    metrics += [f"AP-{each}" for each in things if len(things) > 1]
    return {f"{task}/{metric}" for task in coco_tasks(cfg) or [] for metric in metrics}


def _cityscapes_instance_metrics(cfg: CfgNode, name: str) -> set[str]:
    known = _coco_metrics(cfg, name)
    if cfg.MODEL.MASK_ON:
        things = ["", *(f"-{each}" for each in MetadataCatalog.get(name).thing_classes)]
        known |= {f"cityscapes/{metric}{each}" for metric in ("AP", "AP50") for each in things}
    return known


def _cityscapes_sem_seg_metrics(cfg: CfgNode, name: str) -> set[str]:
    known = {f"sem_seg/{metric}" for metric in ("IoU", "iIoU", "IoU_sup", "iIoU_sup")}
    return known | {f"sem_seg/IoU-{each}" for each in MetadataCatalog.get(name).stuff_classes}


def _classification_metrics(cfg: CfgNode, name: str) -> set[str]:
    return {f"classification/top{k}" for k in top_ks(cfg.MODEL.CLASSIFIER.NUM_CLASSES)}


# Functions by the evaluator_type of a data set's metadata, which return the names of its
# evaluator's metrics, as in metrics.json.
_METRIC_NAMES: dict[str, Callable[[CfgNode, str], set[str]]] = {
    "coco": _coco_metrics,
    "cityscapes_instance": _cityscapes_instance_metrics,
    "cityscapes_sem_seg": _cityscapes_sem_seg_metrics,
    "classification": _classification_metrics,
}


def _known_metrics(cfg: CfgNode, name: str) -> list[str]:
    """Names of an evaluator's metrics, if they are known before it runs."""
    kind = MetadataCatalog.get(name).get("evaluator_type")
    known = _METRIC_NAMES[kind](cfg, name) if kind in _METRIC_NAMES else set()
    prefix = f"{name}/" if len(cfg.DATASETS.TEST) > 1 else ""
    return sorted(prefix + printable(metric) for metric in known)


def _check_metric(wanted: str, metrics: Iterable[str]) -> None:
    metrics = list(metrics)
    if not wanted or wanted in metrics:
        return
    near = difflib.get_close_matches(wanted, metrics, n=1)
    hint = f", the nearest is {near[0]}" if near else ""
    main = ", ".join(name for name in metrics if "-" not in name.rpartition("/")[2])
    raise UsageError(f"TEST.BEST_METRIC is {wanted!r}{hint}; there are {main or 'no metrics'}")


def check_best_metric(cfg: CfgNode) -> None:
    """Checks TEST.BEST_METRIC before any evaluation, as far as evaluators and classes are known.

    The classes of a registered data set are only known once it is loaded.

    Raises:
        UserError: if it is not one of the available metrics, which the message lists.
    """
    kinds = {name: MetadataCatalog.get(name).get("evaluator_type") for name in cfg.DATASETS.TEST}
    unknown = any(kind == "coco" and not coco_class_names(name) for name, kind in kinds.items())
    if unknown and "/AP-" in cfg.TEST.BEST_METRIC:
        return
    known = [_known_metrics(cfg, name) for name in cfg.DATASETS.TEST]
    if all(known):
        _check_metric(cfg.TEST.BEST_METRIC, [metric for each in known for metric in each])


def main_metric(cfg: CfgNode, metrics: Iterable[str]) -> str:
    """Returns the metric that selects the best weights; "" if there is none.

    Args:
        cfg: the config, of which TEST.BEST_METRIC is read; by default, the metric is the first data
            set's main metric.
        metrics: names of all metrics of an evaluation, as in metrics.json.

    Raises:
        UserError: if TEST.BEST_METRIC is not one of them.
    """
    if cfg.TEST.BEST_METRIC:
        _check_metric(cfg.TEST.BEST_METRIC, metrics)
        return cfg.TEST.BEST_METRIC
    prefix = f"{cfg.DATASETS.TEST[0]}/" if len(cfg.DATASETS.TEST) > 1 else ""
    given = set(metrics)
    return next((prefix + name for name in MAIN_METRICS if prefix + name in given), "")
