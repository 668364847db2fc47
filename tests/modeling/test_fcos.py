"""Tests both forms of FCOS against Detectron2's FCOS and against the formulas."""

import pytest
import torch
from conftest import REPOSITORY
from detectron2.engine import launch
from detectron2.modeling.meta_arch import fcos as detectron2_fcos
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from contnet.config import load_config
from contnet.modeling.build import build_model

CONFIGS = REPOSITORY / "configs"
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "64", "MODEL.FCOS.NUM_CLASSES", "3"),
    *("MODEL.FCOS.NUM_CONVS", "1", "MODEL.FCOS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.FCOS.TOPK_CANDIDATES_TEST", "20"),
]
# Left, top, right, bottom in pixels; the first box lies within the third.
BOXES = [[10.0, 12.0, 42.0, 60.0], [60.0, 8.0, 90.0, 30.0], [2.0, 2.0, 94.0, 94.0]]


def _model(name, *opts):
    torch.manual_seed(0)
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), [*SMALL, *opts])
    return cfg, build_model(cfg)


def _batch(boxes=BOXES, seed=0):
    instances = Instances((96, 96))
    instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.gt_classes = torch.arange(len(boxes)) % 3
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8, generator=generator)
    return [{"image": image, "instances": instances}]


def test_improved_form_is_detectron2s():
    cfg, ours = _model("fcos_contti")
    shapes = [ours.backbone.output_shape()[name] for name in cfg.MODEL.FCOS.IN_FEATURES]
    theirs = detectron2_fcos.FCOS(
        backbone=ours.backbone,
        head=detectron2_fcos.FCOSHead(input_shape=shapes, num_classes=3, conv_dims=[64], norm="GN"),
        head_in_features=cfg.MODEL.FCOS.IN_FEATURES,
        num_classes=3,
        test_score_thresh=0.0,
        test_topk_candidates=20,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    theirs.load_state_dict(ours.state_dict())
    with EventStorage():
        losses = ours(_batch()), theirs(_batch())
    assert losses[0].keys() == losses[1].keys()
    for key, loss in losses[0].items():
        assert loss.item() == losses[1][key].item() > 0
    with torch.no_grad():
        found = [model.eval()(_batch())[0]["instances"] for model in (ours, theirs)]
    assert len(found[0]) == len(found[1]) > 0
    assert torch.equal(found[0].pred_boxes.tensor, found[1].pred_boxes.tensor)
    assert torch.equal(found[0].scores, found[1].scores)


def test_plain_form_takes_every_place_in_a_box():
    """The places are at stride 8, without centre sampling; the larger box is on coarser levels."""
    labels = {}
    for name in ("fcos_contti", "fcos_plain_contm"):
        _, model = _model(name, "MODEL.CONTNET.VARIANT", "contnet_ti")
        features = [torch.zeros(1, 64, 96 // 8 // 2**i, 96 // 8 // 2**i) for i in range(5)]
        features[4] = torch.zeros(1, 64, 1, 1)
        anchors = model.anchor_generator(features)
        ((gt_labels,), _) = model.label_anchors(anchors, [_batch()[0]["instances"]])
        labels[name] = gt_labels[:144].reshape(12, 12)
    centres = torch.arange(12) * 8 + 4.0
    inside = torch.zeros(2, 12, 12, dtype=torch.bool)
    for i, (x0, y0, x1, y1) in enumerate(BOXES[:2]):
        rows, columns = (centres > y0) & (centres < y1), (centres > x0) & (centres < x1)
        inside[i] = rows[:, None] & columns
    plain = labels["fcos_plain_contm"]
    assert torch.equal(plain == 0, inside[0])
    assert torch.equal(plain == 1, inside[1])
    sampled = labels["fcos_contti"]
    assert 0 < (sampled == 0).sum() < (plain == 0).sum()
    assert ((sampled == 0) <= (plain == 0)).all()


def _area(sides):
    return (sides[0] + sides[2]) * (sides[1] + sides[3])


def test_plain_box_loss_is_weighted_log_iou():
    _, model = _model("fcos_plain_contm", "MODEL.CONTNET.VARIANT", "contnet_ti")
    model.head.scales.data = torch.tensor([1.0, 0.5, 1.5, 1.0, 2.0])
    batch = _batch()
    with EventStorage():
        losses = model(batch)
    features = model.backbone(model.preprocess_image(batch).tensor)
    features = [features[name] for name in model.head_in_features]
    towers = [model.head.bbox_subnet(feature) for feature in features]
    total = weights = 0.0
    strides = (8, 16, 32, 64, 128)
    for level, (tower, stride) in enumerate(zip(towers, strides, strict=True)):
        exponent = model.head.bbox_pred(tower) * model.head.scales[level]
        distances = exponent.exp()[0].permute(1, 2, 0).reshape(-1, 4)
        columns = tower.shape[-1]
        for place, (left, top, right, bottom) in enumerate(distances):
            x, y = (place % columns + 0.5) * stride, (place // columns + 0.5) * stride
            sides = [(x - b[0], y - b[1], b[2] - x, b[3] - y) for b in BOXES]
            low = 0 if level == 0 else 4 * stride
            high = float("inf") if level == 4 else 8 * stride
            fit = [i for i, s in enumerate(sides) if min(s) > 0 and low < max(s) < high]
            if not fit:
                continue
            x0, y0, x1, y1 = min((sides[i] for i in fit), key=_area)
            weight = (min(x0, x1) / max(x0, x1) * min(y0, y1) / max(y0, y1)) ** 0.5
            width = torch.clamp(left, max=x0) + torch.clamp(right, max=x1)
            height = torch.clamp(top, max=y0) + torch.clamp(bottom, max=y1)
            union = (left + right) * (top + bottom) + (x0 + x1) * (y0 + y1) - width * height
            total = total - weight * (width * height / union).log()
            weights += weight
    assert weights > 5
    torch.testing.assert_close(losses["loss_fcos_loc"], total / weights, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["fcos_r50", "fcos_plain_r50"])
def test_centerness_has_its_branch(name):
    _, model = _model(name)
    with EventStorage():
        model(_batch())["loss_fcos_ctr"].backward()
    plain = "plain" in name
    assert (model.head.cls_subnet[0].weight.grad is not None) == plain
    assert (model.head.bbox_subnet[0].weight.grad is None) == plain


@pytest.mark.parametrize("name", ["fcos_contti", "fcos_plain_contm"])
def test_image_without_objects(name):
    _, model = _model(name, "MODEL.CONTNET.VARIANT", "contnet_ti")
    with EventStorage():
        losses = model(_batch(boxes=[]))
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_fcos_loc"] == losses["loss_fcos_ctr"] == 0
    sum(losses.values()).backward()


@pytest.mark.parametrize("name", ["fcos_contti", "fcos_plain_contm"])
def test_losses_under_bfloat16(name):
    _, model = _model(name, "MODEL.CONTNET.VARIANT", "contnet_ti")
    with EventStorage(), torch.autocast("cpu", torch.bfloat16):
        mixed = model(_batch())
    model.loss_normalizer = 300
    with EventStorage():
        exact = model(_batch())
    for key in exact:
        torch.testing.assert_close(mixed[key].float(), exact[key], rtol=0.05, atol=0.01)


def _losses_of_one_rank(folder):
    torch.set_num_threads(1)
    rank = comm.get_rank()
    for name in ("fcos_contti", "fcos_plain_contm"):
        _, model = _model(name, "MODEL.CONTNET.VARIANT", "contnet_ti")
        with EventStorage():
            losses = model(_batch(BOXES if rank == 0 else BOXES[1:2], seed=rank))
        result = {key: loss.item() for key, loss in losses.items()}
        torch.save((result, model.loss_normalizer), f"{folder}/{name}{rank}.pt")


@pytest.mark.slow
def test_losses_are_normalised_over_all_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch(_losses_of_one_rank, 2, dist_url="auto", args=(str(tmp_path),))
    for name in ("fcos_contti", "fcos_plain_contm"):
        ranks = [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)]
        _, model = _model(name, "MODEL.CONTNET.VARIANT", "contnet_ti")
        sums = []
        for rank, boxes in enumerate((BOXES, BOXES[1:2])):
            model.loss_normalizer = 0.0
            with EventStorage() as storage:
                losses = model(_batch(boxes, seed=rank))
                positive = storage.history("num_pos_anchors").latest()
            # A single process divides by a tenth of its positives.
            sums.append((positive, {k: loss.item() * positive / 10 for k, loss in losses.items()}))
        mean = (sums[0][0] + sums[1][0]) / 2
        for (result, normalizer), (_, alone) in zip(ranks, sums, strict=True):
            assert normalizer == pytest.approx(0.9 * 300 + 0.1 * mean)
            for key in ("loss_fcos_cls", "loss_fcos_ctr"):
                assert result[key] == pytest.approx(alone[key] / normalizer, rel=1e-4)
        if "plain" in name:
            # Each rank's own weights over their mean: these shares sum to the number of ranks.
            shares = [
                result["loss_fcos_loc"] / (alone["loss_fcos_loc"] * 10 / positive)
                for (result, _), (positive, alone) in zip(ranks, sums, strict=True)
            ]
            assert sum(shares) == pytest.approx(2, rel=1e-4) and shares[0] > 1.1
