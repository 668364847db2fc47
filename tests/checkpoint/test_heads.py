"""Tests fine-tuning to other classes: a head loads the rows of classes with the same names."""

import pytest
import torch
from conftest import QUICK, REPOSITORY, SMALL

from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.metadata import describe_model
from contnet.config import load_config
from contnet.modeling.build import build_model

OLD, NEW = ["cat", "person", "dog"], ["dog", "bird", "cat", "fish"]
# By model: its config, the key of its classes, its class tensors with anchors, width and extra
# rows, and options.
FASTER = ("faster_rcnn_contti.yaml", "MODEL.ROI_HEADS.NUM_CLASSES")
BOXES = {
    "roi_heads.box_predictor.cls_score": (1, 1, 1),
    "roi_heads.box_predictor.bbox_pred": (1, 4, 0),
}
MODELS = {
    "faster": (*FASTER, BOXES, ()),
    "agnostic": (
        *FASTER,
        {"roi_heads.box_predictor.cls_score": (1, 1, 1)},
        ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
    ),
    "cascade": (
        *FASTER,
        {f"roi_heads.box_predictor.{i}.cls_score": (1, 1, 1) for i in range(3)},
        (
            "MODEL.ROI_HEADS.NAME",
            "CascadeROIHeads",
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
            "True",
        ),
    ),
    "mask": (
        "mask_rcnn_contti.yaml",
        FASTER[1],
        {**BOXES, "roi_heads.mask_head.predictor": (1, 1, 0)},
        (),
    ),
    "retinanet": (
        "retinanet_contti.yaml",
        "MODEL.RETINANET.NUM_CLASSES",
        {"head.cls_score": (9, 1, 0)},
        (),
    ),
    "fcos": (
        "fcos_contti.yaml",
        "MODEL.FCOS.NUM_CLASSES",
        {"head.cls_score": (1, 1, 0)},
        ("MODEL.FPN.OUT_CHANNELS", "64"),
    ),
    "pspnet": (
        "cityscapes/pspnet_contti.yaml",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
        {
            "sem_seg_head.classifier.2": (1, 1, 0),
            "sem_seg_head.aux_classifier.2": (1, 1, 0),
        },
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice"),
    ),
    "classifier": (
        "imagenet/contti.yaml",
        "MODEL.CLASSIFIER.NUM_CLASSES",
        {"network.head": (1, 1, 0)},
        (),
    ),
    "timm's": (
        "imagenet/res18.yaml",
        "MODEL.CLASSIFIER.NUM_CLASSES",
        {"network.fc": (1, 1, 0)},
        (),
    ),
}


def checkpointer(kind, classes, folder="", number=None):
    """Returns the checkpointer of a small model whose head has no two equal rows."""
    leaf, key, _, options = MODELS[kind]
    small = QUICK if leaf.startswith("imagenet/") else SMALL
    options = [*small, *options, key, str(number or len(classes))]
    cfg = load_config(str(REPOSITORY / "configs" / leaf), options)
    model = build_model(cfg)
    for name in MODELS[kind][2]:
        torch.nn.init.normal_(model.get_parameter(f"{name}.weight"))
        torch.nn.init.normal_(model.get_parameter(f"{name}.bias"))
    return Checkpointer(model, str(folder), metadata=describe_model(cfg, classes))


def saved(folder, kind, classes, **options):
    source = checkpointer(kind, classes, folder, **options)
    source.save("model_final")
    return str(folder / "model_final.pth"), source.model.state_dict()


def rows_of(tensor, layout, number):
    """Returns the rows of classes (groups, classes, width, ...), and the rows after them."""
    groups, width, extra = layout
    count = groups * number * width
    assert len(tensor) == count + extra
    return tensor[:count].reshape(groups, number, width, -1), tensor[count:]


def head_line(caplog):
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("head: ")]
    return line


@pytest.mark.parametrize(
    ("kind", "new"),
    [*((kind, NEW) for kind in MODELS), ("mask", OLD[::-1]), ("retinanet", ["person", "a", "b"])],
)
def test_rows_of_shared_classes_are_taken_by_name(tmp_path, caplog, kind, new):
    file, old_state = saved(tmp_path, kind, OLD)
    target = checkpointer(kind, new)
    fresh = {name: value.clone() for name, value in target.model.state_dict().items()}
    with caplog.at_level("INFO"):
        target.load_backbone(file)
    state = target.model.state_dict()
    for part, layout in MODELS[kind][2].items():
        for name in (f"{part}.weight", f"{part}.bias"):
            found, extra = rows_of(state[name], layout, len(new))
            before, _ = rows_of(fresh[name], layout, len(new))
            old, old_extra = rows_of(old_state[name], layout, len(OLD))
            assert torch.equal(extra, old_extra)
            for i, label in enumerate(new):
                expected = old[:, OLD.index(label)] if label in OLD else before[:, i]
                assert torch.equal(found[:, i], expected), (name, label)
    heads = tuple(MODELS[kind][2])
    for name, value in state.items():  # and everything else
        assert name.startswith(heads) or torch.equal(value, old_state[name]), name
    shared = sum(label in OLD for label in new)
    assert f"{shared} of {len(new)} classes copied by name from {file}" in head_line(caplog)


@pytest.mark.parametrize(
    ("kind", "new"), [*((kind, list("abc")) for kind in MODELS), ("faster", ["Cat", *"abc"])]
)
def test_a_head_of_other_classes_is_fresh(tmp_path, caplog, kind, new):
    file, _ = saved(tmp_path, kind, OLD)
    target = checkpointer(kind, new)
    fresh = {name: value.clone() for name, value in target.model.state_dict().items()}
    with caplog.at_level("INFO"):
        target.load_backbone(file)
    state = target.model.state_dict()
    for part in MODELS[kind][2]:
        assert torch.equal(state[f"{part}.weight"], fresh[f"{part}.weight"])
        assert torch.equal(state[f"{part}.bias"], fresh[f"{part}.bias"])
    line = head_line(caplog)
    assert "none of the" in line
    assert ("Cat is cat there" in line) == ("Cat" in new)


@pytest.mark.parametrize("kind", ["faster", "classifier"])
def test_the_same_classes_keep_their_head_without_a_word(tmp_path, caplog, kind):
    file, old_state = saved(tmp_path, kind, OLD)
    target = checkpointer(kind, OLD)
    with caplog.at_level("INFO"):
        target.load_backbone(file)
    assert all(torch.equal(v, old_state[k]) for k, v in target.model.state_dict().items())
    assert not any(r.getMessage().startswith("head: ") for r in caplog.records)


def test_boxes_that_were_blind_to_classes_leave_those_of_classes_fresh(tmp_path):
    file, old_state = saved(tmp_path, "agnostic", OLD)
    target = checkpointer("faster", NEW)
    fresh = target.model.roi_heads.box_predictor.bbox_pred.weight.clone()
    target.load_backbone(file)
    predictor = target.model.roi_heads.box_predictor
    assert torch.equal(predictor.bbox_pred.weight, fresh)
    old = old_state["roi_heads.box_predictor.cls_score.weight"]
    assert torch.equal(predictor.cls_score.weight[2], old[0])


def test_a_head_that_is_taken_must_be_finite(tmp_path):
    file, _ = saved(tmp_path, "faster", OLD)
    content = torch.load(file)
    content["model"]["roi_heads.box_predictor.cls_score.weight"][0] = torch.nan
    torch.save(content, file)
    with pytest.raises(Exception, match=r"cls_score\.weight is not finite"):
        checkpointer("faster", NEW).load_backbone(file)
    checkpointer("faster", ["a", "b", "c"]).load_backbone(file)
