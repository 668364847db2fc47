"""Mappers convert a data set dict to a model input.

:class:`Mapper`, for evaluation, is Detectron2's with the project's image reader.
:class:`FastMapper` does the same for training in less time. Augmentations, their random draws and
annotations are Detectron2's. Images are stored as planes from the start, as the model takes them,
and PyTorch resizes them with Pillow's filter in a third of Pillow's time; a few values are rounded
to the next level. Boxes and polygons of an image are transformed together, without first copying
all annotations.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import Boxes, BoxMode, Instances, PolygonMasks
from PIL import Image
from torch.nn import functional

from contnet.config.keys import MAX_PIXELS
from contnet.data.datasets.shards import sample_name
from contnet.data.pipeline.images import (
    UnreadableFile,
    read_image,
    read_labels,
    read_pixels,
    without_pillow_limit,
)
from contnet.data.pipeline.transforms import (
    build_classification_transform,
    build_segmentation_augmentation,
)
from contnet.modeling.pspnet import SEGMENTORS
from contnet.modeling.thin_images import keep_a_pixel
from contnet.utils.errors import UserError
from contnet.utils.failures import out_of_memory

__all__ = ["ClassificationMapper", "FastMapper", "Mapper", "NamedErrors", "build_train_mapper"]


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes with antialiased bilinear interpolation, uint8 (H, W, 3) to (height, width, 3)."""
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    planes = functional.interpolate(planes[None], (height, width), mode="bilinear", antialias=True)
    return planes[0].contiguous().numpy().transpose(1, 2, 0)


def _flip(image: np.ndarray) -> np.ndarray:
    """Flips an image horizontally."""
    planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return planes.flip(2).numpy().transpose(1, 2, 0)


class _PlanarInput(T.AugInput):
    """An image (H, W, C) that is stored as planes, and a label map if there is one."""

    def transform(self, transform: T.Transform) -> None:
        """Applies a transform to both, with faster code for the usual transforms."""
        image = self.image
        colours = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        if colours and type(transform) is T.ResizeTransform and transform.interp == Image.BILINEAR:
            self.image = _resize(image, transform.new_h, transform.new_w)
        elif colours and type(transform) is T.HFlipTransform:
            self.image = _flip(image)
        else:
            self.image = transform.apply_image(image)
        if self.sem_seg is not None:
            self.sem_seg = transform.apply_segmentation(self.sem_seg)


def _as_floats(boxes: object) -> np.ndarray:
    """Returns boxes as an array; integers become floats."""
    boxes = np.asarray(boxes)
    return boxes if boxes.dtype.kind == "f" else boxes.astype(float)


def _own_arrays(annotation: dict) -> dict:
    """Returns a copy whose coordinates are floats and can be transformed in place."""
    copy = {**annotation, "bbox": [float(number) for number in annotation["bbox"]]}
    if isinstance(copy.get("segmentation"), list):
        copy["segmentation"] = [np.array(polygon, float) for polygon in copy["segmentation"]]
    if "keypoints" in copy:
        copy["keypoints"] = np.array(copy["keypoints"], float)
    return copy


def _transform_boxes(
    annotations: Sequence[dict], transforms: T.TransformList, shape: tuple[int, int]
) -> Boxes:
    """Transforms all boxes and clips them to the new image of ``shape`` (height, width)."""
    # As floats, because Detectron2 would truncate the results for integer coordinates.
    if all(each["bbox_mode"] == BoxMode.XYWH_ABS for each in annotations):
        boxes = np.array([each["bbox"] for each in annotations], float)
        # Detectron2 computes the sums in single precision.
        boxes = boxes.astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        boxes = transforms.apply_box(boxes.astype(float))
    else:
        corners = BoxMode.XYXY_ABS
        pairs = [([float(n) for n in each["bbox"]], each["bbox_mode"]) for each in annotations]
        boxes = [BoxMode.convert(box, mode, corners) for box, mode in pairs]
        boxes = np.concatenate([transforms.apply_box(np.array([box])) for box in boxes])
    boxes = boxes.clip(min=0)
    return Boxes(np.minimum(boxes, [*shape[::-1], *shape[::-1]]))


def _transform_polygons(
    annotations: Sequence[dict], transforms: T.TransformList
) -> list[list[np.ndarray]]:
    """Transforms polygons to flat arrays, all points together if each point moves independently."""
    shapes = [[np.array(points, float) for points in each["segmentation"]] for each in annotations]
    every = [polygon for polygons in shapes for polygon in polygons]
    apart = all(type(t).apply_polygons is T.Transform.apply_polygons for t in transforms.transforms)
    if not apart or not every:
        shapes = [[points.reshape(-1, 2) for points in polygons] for polygons in shapes]
        shapes = [transforms.apply_polygons(polygons) for polygons in shapes]
        return [[points.reshape(-1) for points in polygons] for polygons in shapes]
    points = transforms.apply_coords(np.concatenate(every).reshape(-1, 2)).reshape(-1)
    moved = iter(np.split(points, np.cumsum([len(polygon) for polygon in every])))
    return [[next(moved) for _ in polygons] for polygons in shapes]


class Mapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``, with the same config, augmentations and result.

    Images are read by :mod:`contnet.data.pipeline.images` and keep at least one pixel. Integer
    coordinates are treated like floats; Detectron2 would truncate the transformed ones.

    Args:
        max_pixels: INPUT.MAX_PIXELS.
        **kwargs: arguments of Detectron2's mapper.
    """

    aug_input: type[T.AugInput] = T.AugInput

    @configurable
    def __init__(self, *, max_pixels: int = MAX_PIXELS, **kwargs):
        super().__init__(**kwargs)
        self.max_pixels = max_pixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        arguments = super().from_config(cfg, is_train)
        arguments["augmentations"] = keep_a_pixel(arguments["augmentations"])
        return {**arguments, "max_pixels": cfg.INPUT.MAX_PIXELS}

    def __call__(self, dataset_dict: dict) -> dict:
        """Returns the model input: the record with ``image`` (C, H, W) and its ground truth.

        Args:
            dataset_dict: record of a data set, which is not modified.

        Raises:
            SizeMismatchError: if the image's size differs from the record's.
            UnreadableFile: if a file cannot be read.
        """
        record = dict(dataset_dict)
        image = read_pixels(record, self.image_format, self.max_pixels)
        detection_utils.check_image_size(record, image)
        labels = None
        if "sem_seg_file_name" in record:
            labels = read_labels(record.pop("sem_seg_file_name"), self.max_pixels)
        moved = self.aug_input(image, sem_seg=labels)
        transforms = self.augmentations(moved)
        height, width = moved.image.shape[:2]
        planes = np.ascontiguousarray(moved.image.transpose(2, 0, 1))
        record["image"] = torch.from_numpy(planes)
        if labels is not None:
            record["sem_seg"] = torch.as_tensor(moved.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            if "proposal_boxes" in record:
                record["proposal_boxes"] = _as_floats(record["proposal_boxes"])
            detection_utils.transform_proposals(
                record, (height, width), transforms, proposal_topk=self.proposal_topk
            )
        annotations = record.pop("annotations", None)
        if self.is_train and annotations is not None:
            record["annotations"] = [each for each in annotations if not each.get("iscrowd", 0)]
            self._transform_annotations(record, transforms, (height, width))
        return record

    def _transform_annotations(
        self, dataset_dict: dict, transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> None:
        own = [_own_arrays(each) for each in dataset_dict["annotations"]]
        dataset_dict["annotations"] = own
        super()._transform_annotations(dataset_dict, transforms, image_shape)


class FastMapper(Mapper):
    """A faster mapper for training: pixels differ by one level at most, the rest is identical."""

    aug_input = _PlanarInput

    def _transform_annotations(
        self, dataset_dict: dict, transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> None:
        annotations = dataset_dict["annotations"]
        masks = self.use_instance_mask and any("segmentation" in each for each in annotations)
        if not annotations or self.use_keypoint or (masks and not self._has_polygons(annotations)):
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        del dataset_dict["annotations"]
        instances = Instances(image_shape)
        instances.gt_boxes = _transform_boxes(annotations, transforms, image_shape)
        classes = [int(each["category_id"]) for each in annotations]
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        if masks:
            instances.gt_masks = PolygonMasks(_transform_polygons(annotations, transforms))
        if self.recompute_boxes:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = detection_utils.filter_empty_instances(instances)

    def _has_polygons(self, annotations: Sequence[dict]) -> bool:
        """Whether masks are wanted as polygons and all are given as polygons."""
        shapes = [each.get("segmentation") for each in annotations]
        return self.instance_mask_format == "polygon" and all(isinstance(s, list) for s in shapes)


def _describe(error: Exception) -> str:
    """Describes an error, with where it was raised unless a damaged file explains it."""
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SizeMismatchError):
        return what
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{what}, in {Path(place.filename).name} line {place.lineno}"


class NamedErrors:
    """Wraps a mapper so that its errors name the image.

    Args:
        mapper: converts a record to a model input.
    """

    def __init__(self, mapper: Callable[[dict], dict]):
        self.mapper = mapper

    def __call__(self, record: dict) -> dict:
        """Returns the mapper's model input.

        Raises:
            UserError: if the image cannot be loaded: a damaged or missing file, another size than
                the record's, annotations that no augmentation can handle. Only running out of
                memory keeps its own error.
        """
        try:
            return self.mapper(record)
        except UnreadableFile as error:
            raise UserError(
                f"{error}: run python tools/doctor.py with this config for a full list"
            ) from error
        except UserError:  # from a user's own mapper
            raise
        except Exception as error:  # in a worker process, its traceback would not name the image
            if out_of_memory(error):  # which is not the image's fault
                raise
            raise UserError(
                f"{sample_name(record)} cannot be loaded ({' '.join(_describe(error).split())}): "
                "run python tools/doctor.py with this config for details"
            ) from error


class ClassificationMapper:
    """Converts a record of a classification data set to an input of ImageClassifier.

    Args:
        cfg: INPUT is read.
        is_train: whether to augment the image.
    """

    def __init__(self, cfg: CfgNode, is_train: bool):
        self.transform = build_classification_transform(cfg, is_train)
        self.max_pixels = cfg.INPUT.MAX_PIXELS

    def __call__(self, record: dict) -> dict:
        """Returns the record with ``image``, uint8 (3, H, W), RGB."""
        image = read_image(record, self.max_pixels)
        with without_pillow_limit():  # Pillow checks its limit again when it crops
            return {**record, "image": torch.as_tensor(self.transform(image))}


def build_train_mapper(cfg: CfgNode) -> FastMapper | ClassificationMapper:
    """Builds the training mapper for the config's model, with its augmentation."""
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier":
        return ClassificationMapper(cfg, is_train=True)
    if cfg.MODEL.META_ARCHITECTURE in SEGMENTORS:
        return FastMapper(cfg, is_train=True, augmentations=build_segmentation_augmentation(cfg))
    return FastMapper(cfg, is_train=True)
