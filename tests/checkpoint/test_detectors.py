"""Tests training from and evaluation of detectors of Detectron2, torchvision and MMDetection."""

import pickle

import pytest
import torch
from conftest import QUICK, REPOSITORY
from detectron2.data import MetadataCatalog
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torchvision.models import detection
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.image_list import ImageList

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.detectors import translate_detector
from contnet.checkpoint.metadata import describe_model
from contnet.checkpoint.reading import read_weights
from contnet.config import load_config
from contnet.modeling.build import build_model
from contnet.utils.errors import UserError

COCO = MetadataCatalog.get("coco_2017_train").thing_classes
CATEGORIES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
P5 = ("MODEL.BACKBONE.NAME", "build_fcos_resnet_fpn_backbone")


def checkpointer(leaf, *options, classes=COCO):
    cfg = load_config(str(REPOSITORY / "configs" / leaf), [*QUICK, *options])
    return Checkpointer(build_model(cfg).eval(), metadata=describe_model(cfg, classes))


@pytest.fixture
def lines(caplog):
    with caplog.at_level("INFO"):
        yield lambda: [record.getMessage() for record in caplog.records]


# --- Detectron2's zoo ----------------------------------------------------------------------------

ZOO = {
    "faster": ("faster_rcnn_r50.yaml", "MODEL.ROI_HEADS.NUM_CLASSES"),
    "mask": ("mask_rcnn_r50.yaml", "MODEL.ROI_HEADS.NUM_CLASSES"),
    "retinanet": ("retinanet_r50.yaml", "MODEL.RETINANET.NUM_CLASSES"),
}
ZOO_KEYS = [
    *("INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"),
    *("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]", "MODEL.RESNETS.STRIDE_IN_1X1", "True"),
]


def zoo_file(folder, model, author="Detectron2 Model Zoo", **more):
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    path = folder / "model_final_1a2b3c.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": author, **more}))
    return str(path)


@pytest.mark.parametrize("kind", ZOO)
def test_a_detector_of_the_zoo_loads_exactly_and_gives_rows_by_name(tmp_path, lines, kind):
    leaf, key = ZOO[kind]
    source = checkpointer(leaf)
    file = zoo_file(tmp_path, source.model)
    for method in ("load", "load_backbone"):
        target = checkpointer(leaf)
        getattr(target, method)(file)
        expected = source.model.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in target.model.state_dict().items())
        (warning,) = target.warnings
        assert (
            " ".join(
                f'{k} "{v}"' if v[0] == "[" else f"{k} {v}"
                for k, v in zip(ZOO_KEYS[::2], ZOO_KEYS[1::2], strict=True)
            )
            in warning
        )
    own = checkpointer(leaf, *ZOO_KEYS, key, "2", classes=["tree", "person"])
    own.load_backbone(file)
    assert not own.warnings
    assert any("1 of 2 classes copied by name" in line for line in lines())
    name = (
        "head.cls_score.bias" if kind == "retinanet" else "roi_heads.box_predictor.cls_score.bias"
    )
    groups = 9 if kind == "retinanet" else 1
    found = own.model.state_dict()[name][: 2 * groups].view(groups, 2)
    old = expected[name][: 80 * groups].view(groups, 80)
    assert torch.equal(found[:, 1], old[:, COCO.index("person")])


AUTHORS = {
    "MSRA": "STRIDE_IN_1X1 True",
    "Caffe2": "STRIDE_IN_1X1 True",
    "FAIR": "PIXEL_STD",
    "pycls": 'PIXEL_STD "[57.375, 57.12, 58.395]"',
}


@pytest.mark.parametrize("author", AUTHORS)
def test_a_resnet_of_the_zoo_says_which_keys_to_set(tmp_path, author):
    network = checkpointer("faster_rcnn_r50.yaml").model.backbone.bottom_up
    file = zoo_file(tmp_path, network, author, matching_heuristics=True)
    target = checkpointer("faster_rcnn_r50.yaml")
    target.load_backbone(file)
    (warning,) = target.warnings
    assert "INPUT.FORMAT BGR" in warning
    assert AUTHORS[author] in warning
    assert torch.equal(target.model.backbone.bottom_up.stem.conv1.weight, network.stem.conv1.weight)


def test_a_resnet_of_torchvisions_in_the_zoo_fits_the_configs(tmp_path):
    network = checkpointer("faster_rcnn_r50.yaml").model.backbone.bottom_up
    target = checkpointer("faster_rcnn_r50.yaml")
    target.load_backbone(zoo_file(tmp_path, network, "torchvision", matching_heuristics=True))
    assert not target.warnings
    strange = checkpointer("faster_rcnn_r50.yaml", *ZOO_KEYS)
    strange.load_backbone(zoo_file(tmp_path, network, "torchvision", matching_heuristics=True))
    (warning,) = strange.warnings
    assert 'INPUT.FORMAT RGB MODEL.PIXEL_MEAN "[123.675, 116.28, 103.53]"' in warning


# --- torchvision ---------------------------------------------------------------------------------


def shaken(model):
    """Makes weights in which no two classes, anchors or channels are equal."""
    for name, tensor in model.state_dict().items():
        if "running" not in name and tensor.is_floating_point() and ".body." not in name:
            torch.nn.init.normal_(tensor, std=0.05)
    return model.eval()


def torchvision_file(folder, name, **options):
    model = shaken(getattr(detection, name)(weights=None, weights_backbone=None, **options))
    torch.save(model.state_dict(), folder / "theirs.pth")
    return model, str(folder / "theirs.pth")


@torch.no_grad()
def features_of(theirs, ours, levels):
    image = torch.randn(1, 3, 128, 128)
    expected, found = theirs.backbone(image), ours.backbone(image)
    names = dict(zip(levels, expected, strict=True))
    for ours_name, their_name in names.items():
        torch.testing.assert_close(
            found[ours_name],
            expected[their_name],
            rtol=1e-3,
            atol=1e-3 * expected[their_name].abs().max(),
        )
    return [expected[name] for name in names.values()]


KEPT = [i for i, name in enumerate(CATEGORIES) if name in COCO]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["faster", "mask"])
def test_faster_and_mask_rcnn_of_torchvision(tmp_path, lines, kind):
    theirs, file = torchvision_file(tmp_path, f"{kind}rcnn_resnet50_fpn")
    ours = checkpointer(f"{kind}_rcnn_r50.yaml")
    ours.load(file)
    model = ours.model
    assert not ours.warnings
    assert any("is a detector of torchvision" in line for line in lines())
    features = features_of(theirs, model, ["p2", "p3", "p4", "p5", "p6"])
    logits, deltas = theirs.rpn.head(features)
    found_logits, found_deltas = model.proposal_generator.rpn_head(features)
    for pairs in (zip(logits, found_logits), zip(deltas, found_deltas)):  # noqa: B905
        for one, other in pairs:
            torch.testing.assert_close(one, other)
    pooled = torch.randn(3, 256, 7, 7)
    scores, boxes = theirs.roi_heads.box_predictor(theirs.roi_heads.box_head(pooled))
    found_scores, found_boxes = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    torch.testing.assert_close(found_scores, scores[:, [*KEPT, 0]])
    torch.testing.assert_close(found_boxes, boxes.view(3, 91, 4)[:, KEPT].flatten(1))
    if kind == "mask":
        pooled = torch.randn(2, 256, 14, 14)
        masks = theirs.roi_heads.mask_predictor(theirs.roi_heads.mask_head(pooled))
        torch.testing.assert_close(model.roi_heads.mask_head.layers(pooled), masks[:, KEPT])


def anchors_of(theirs, features):
    """Returns torchvision's and Detectron2's anchors of one position of each level."""
    images = ImageList(torch.zeros(1, 3, 128, 128), [(128, 128)])
    return theirs(images, features)[0]


@torch.no_grad()
def test_retinanet_of_torchvision(tmp_path):
    theirs, file = torchvision_file(tmp_path, "retinanet_resnet50_fpn")
    ours = checkpointer("retinanet_r50.yaml", *P5)
    ours.load(file)
    features = features_of(theirs, ours.model, ["p3", "p4", "p5", "p6", "p7"])
    outputs = theirs.head(features)
    logits, deltas = ours.model.head(features)
    own = ours.model.anchor_generator(features)
    cells = torch.cat([each.tensor for each in own])
    found_logits = torch.cat([x.view(9, 80, -1).permute(2, 0, 1).flatten(0, 1) for x in logits])
    found_deltas = torch.cat([x.view(9, 4, -1).permute(2, 0, 1).flatten(0, 1) for x in deltas])
    # Each anchor's nearest anchor of torchvision, whose sizes and corners are rounded.
    their_cells = anchors_of(theirs.anchor_generator, features)
    order = torch.cdist(cells, their_cells).argmin(dim=1)
    assert (their_cells[order] - cells).abs().max() < 1
    torch.testing.assert_close(found_logits, outputs["cls_logits"][0][order][:, KEPT])
    torch.testing.assert_close(found_deltas, outputs["bbox_regression"][0][order])


@torch.no_grad()
def test_fcos_of_torchvision_keeps_what_means_the_same(tmp_path, lines):
    theirs, file = torchvision_file(tmp_path, "fcos_resnet50_fpn")
    ours = checkpointer("fcos_r50.yaml")
    ours.load_backbone(file)
    features = features_of(theirs, ours.model, ["p3", "p4", "p5", "p6", "p7"])
    logits, _, _ = ours.model.head(features)
    found = torch.cat([x.flatten(2).transpose(1, 2) for x in logits], dim=1)
    torch.testing.assert_close(found, theirs.head(features)["cls_logits"][..., KEPT])
    (line,) = [line for line in lines() if "is a detector of torchvision" in line]
    assert "head.regression_head.bbox_reg.weight" in line


def test_a_fine_tuned_detector_of_torchvision(tmp_path):
    """The file has two classes and the background, without class names."""
    theirs, file = torchvision_file(tmp_path, "fasterrcnn_resnet50_fpn", num_classes=3)
    ours = checkpointer(
        "faster_rcnn_r50.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", "2", classes=["cat", "dog"]
    )
    ours.load_backbone(file)
    (warning,) = ours.warnings
    assert "does not name its classes" in warning
    scores = theirs.roi_heads.box_predictor.cls_score.bias
    assert torch.equal(ours.model.roi_heads.box_predictor.cls_score.bias, scores[[1, 2, 0]])


# --- MMDetection ---------------------------------------------------------------------------------


def resnet_state(model):
    """Returns a backbone with MMDetection's names, which are torchvision's."""
    from contnet.checkpoint.key_mapping import torchvision_name

    prefix = "backbone.bottom_up."
    return {
        "backbone." + torchvision_name(k.removeprefix(prefix)): v
        for k, v in model.state_dict().items()
        if k.startswith(prefix)
    }


def mmdetection_names(model, tensors):
    """Returns the other tensors of a two-stage detector with MMDetection's names."""
    table = {
        "backbone.fpn_lateral": lambda i: f"neck.lateral_convs.{i - 2}.conv",
        "backbone.fpn_output": lambda i: f"neck.fpn_convs.{i - 2}.conv",
        "roi_heads.mask_head.mask_fcn": lambda i: f"roi_head.mask_head.convs.{i - 1}.conv",
        "roi_heads.box_head.fc": lambda i: f"roi_head.bbox_head.shared_fcs.{i - 1}",
    }
    plain = {
        "proposal_generator.rpn_head.conv": "rpn_head.rpn_conv",
        "proposal_generator.rpn_head.objectness_logits": "rpn_head.rpn_cls",
        "proposal_generator.rpn_head.anchor_deltas": "rpn_head.rpn_reg",
        "roi_heads.box_predictor.cls_score": "roi_head.bbox_head.fc_cls",
        "roi_heads.box_predictor.bbox_pred": "roi_head.bbox_head.fc_reg",
        "roi_heads.mask_head.deconv": "roi_head.mask_head.upsample",
        "roi_heads.mask_head.predictor": "roi_head.mask_head.conv_logits",
    }
    named = {}
    for name, value in tensors.items():
        part, _, leaf = name.rpartition(".")
        if part in plain:
            named[f"{plain[part]}.{leaf}"] = value
        for start, make in table.items():
            if part.startswith(start):
                named[f"{make(int(part.removeprefix(start)))}.{leaf}"] = value
    return {**resnet_state(model), **named}


def test_mask_rcnn_of_mmdetection(tmp_path, lines):
    """The layout of boxes, classes and anchors is the same as in Detectron2."""
    source = checkpointer("mask_rcnn_r50.yaml").model
    state = source.state_dict()
    meta = {"dataset_meta": {"classes": tuple(COCO)}, "epoch": 12}
    file = str(tmp_path / "theirs.pth")
    torch.save({"meta": meta, "state_dict": mmdetection_names(source, state)}, file)
    for method in ("load", "load_backbone"):
        ours = checkpointer("mask_rcnn_r50.yaml")
        getattr(ours, method)(file)
        assert all(torch.equal(v, state[k]) for k, v in ours.model.state_dict().items())
    assert any("is a detector of MMDetection" in line for line in lines())
    own = checkpointer("mask_rcnn_r50.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", "1", classes=["person"])
    own.load_backbone(file)
    bias = own.model.roi_heads.box_predictor.cls_score.bias
    assert torch.equal(bias, state["roi_heads.box_predictor.cls_score.bias"][[0, 80]])


def test_anchors_of_mmdetections_retinanet():
    """Its anchors are ordered by ratio, then by size (see its AnchorGenerator)."""
    ratios, scales = torch.tensor([0.5, 1.0, 2.0]), 4 * 2 ** (torch.arange(3) / 3)
    root = ratios.sqrt()
    widths = (8 / root[:, None] * scales[None]).view(-1)
    heights = (8 * root[:, None] * scales[None]).view(-1)
    sizes = [[32 * 2 ** (i / 3) for i in range(3)]]
    own = DefaultAnchorGenerator(sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=[8])
    (cells,) = own.cell_anchors
    wanted = torch.stack([cells[:, 2] - cells[:, 0], cells[:, 3] - cells[:, 1]], dim=1)
    theirs = torch.stack([widths, heights], dim=1)
    state = {
        "bbox_head.retina_reg.bias": torch.cat([theirs, theirs], dim=1).flatten(),
        "bbox_head.retina_cls.bias": torch.stack([widths, heights], dim=1).flatten(),
        "neck.lateral_convs.0.conv.bias": torch.zeros(1),
    }
    made, _ = translate_detector(state, "mmdetection")
    torch.testing.assert_close(made["head.bbox_pred.bias"].view(9, 4)[:, :2], wanted)
    torch.testing.assert_close(made["head.cls_score.bias"].view(9, 2), wanted)


class HistoryBuffer:
    """Has the name of MMEngine's class, whose instances are in its checkpoints."""

    def __init__(self):
        import numpy as np

        self._log_history = np.ones(3)


HistoryBuffer.__module__ = "mmengine.logging.history_buffer"


def test_objects_beside_the_weights_are_left_out(tmp_path, monkeypatch):
    """A checkpoint of MMEngine has such objects; none of its modules are imported."""
    import argparse
    import sys
    import types

    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer
    content = {
        "state_dict": {"a": torch.ones(2)},
        "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}},
        "args": argparse.Namespace(lr=0.1),
        "folder": tmp_path,
    }
    torch.save(content, tmp_path / "w.pth")
    for name in list(sys.modules):
        if name.startswith("mmengine"):
            monkeypatch.delitem(sys.modules, name)
    weights = read_weights(str(tmp_path / "w.pth"))
    assert torch.equal(weights.tensors["a"], torch.ones(2))
    assert not any(name.startswith("mmengine") for name in sys.modules)
    assert not isinstance(weights.rest["message_hub"]["log_scalars"]["train/loss"], HistoryBuffer)


def test_functions_are_left_out_and_weights_in_objects_are_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "hook": pytest.raises}, tmp_path / "w.pth")
    weights = read_weights(str(tmp_path / "w.pth"))
    assert torch.equal(weights.tensors["a"], torch.ones(2))
    assert weights.rest["hook"] is not pytest.raises
    torch.save({"state_dict": torch.nn.Linear(1, 1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="could run code"):
        read_weights(str(tmp_path / "w.pth"))
