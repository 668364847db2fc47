"""Tests PSPNet's head, windows, crops and norms."""

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from detectron2.config import get_cfg
from detectron2.layers import NaiveSyncBatchNorm
from PIL import Image
from torch.nn import functional as F

from contnet.config import load_config
from contnet.data.pipeline.mappers import build_train_mapper
from contnet.launch.main import main
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.build import build_model
from contnet.modeling.pspnet import window_starts
from contnet.utils.errors import UserError

LEAF = str(REPOSITORY / "configs" / "cityscapes" / "pspnet_contti.yaml")
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16"),
    *("MODEL.PSP_HEAD.AUX_CONVS_DIM", "16", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5"),
]


def _model(*opts):
    cfg = load_config(LEAF, [*SMALL, *opts])
    torch.manual_seed(0)
    return build_model(cfg)


def _inputs(rows, columns, **more):
    return {"image": torch.randint(0, 256, (3, rows, columns), dtype=torch.uint8), **more}


def test_head_is_what_its_config_says():
    head = _model("MODEL.PSP_HEAD.BINS", "[1,2,4]").sem_seg_head
    # res5 of ConT-Ti has 768 channels, res4 384.
    assert [branch[0].output_size for branch in head.branches] == [1, 2, 4]
    assert all(branch[1].weight.shape == (256, 768, 1, 1) for branch in head.branches)
    assert head.classifier[0].weight.shape == (16, 768 + 3 * 256, 3, 3)
    assert head.aux_classifier[0].weight.shape == (16, 384, 3, 3)
    assert head.stride == head.aux_stride == 8
    assert isinstance(head.classifier[0].norm, NaiveSyncBatchNorm)
    assert _model("MODEL.PSP_HEAD.AUX_LOSS_WEIGHT", "0.0").sem_seg_head.aux_classifier is None


@pytest.mark.parametrize("size", [(64, 96), (61, 83)])
def test_loss_is_cross_entropy_of_what_inference_gives(size):
    """The norms are in the same mode, and there is no dropout."""
    model = _model("MODEL.PSP_HEAD.DROPOUT", "0.0")
    labels = torch.randint(0, 5, size)
    labels[:20] = 255
    inputs = [_inputs(*size, sem_seg=labels)] * 2
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    losses = model(inputs)
    model.eval()
    with torch.no_grad():
        logits = model([_inputs(*size) | {"image": inputs[0]["image"]}])[0]["sem_seg"]
    assert logits.shape == (5, *size)
    expected = F.cross_entropy(logits[None], labels[None], ignore_index=255)
    torch.testing.assert_close(losses["loss_sem_seg"], expected, rtol=1e-4, atol=1e-5)
    assert losses["loss_sem_seg_aux"] > 0


def test_image_without_labels_has_no_loss():
    model = _model()
    labels = torch.full((64, 64), 255)
    losses = model([_inputs(64, 64, sem_seg=labels)] * 2)
    assert losses["loss_sem_seg"] == losses["loss_sem_seg_aux"] == 0
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "window", "stride", "starts"),
    [(10, 4, 3, [0, 3, 6]), (11, 4, 3, [0, 3, 6, 7]), (4, 4, 3, [0]), (3, 4, 1, [0])],
)
def test_windows_cover_everything_once_at_the_border(size, window, stride, starts):
    assert window_starts(size, window, stride) == starts
    covered = {i for start in starts for i in range(start, min(start + window, size))}
    assert covered == set(range(size))


def _window_options(size, stride):
    return [
        *("TEST.SLIDING_WINDOW.ENABLED", "True", "TEST.SLIDING_WINDOW.SIZE", str(size)),
        *("TEST.SLIDING_WINDOW.STRIDE", str(stride)),
    ]


def test_a_window_as_large_as_the_image_is_the_whole_image():
    whole, windowed = _model(), _model(*_window_options([200, 200], [100, 100]))
    inputs = [_inputs(60, 90, height=30, width=45)]
    with torch.no_grad():
        a, b = (model.eval()(inputs)[0]["sem_seg"] for model in (whole, windowed))
    assert a.shape == (5, 30, 45)
    torch.testing.assert_close(a, b)


def test_windows_are_averaged():
    whole, windowed = _model().eval(), _model(*_window_options([64, 64], [40, 64])).eval()
    inputs = _inputs(104, 64)
    with torch.no_grad():
        found = windowed([inputs])[0]["sem_seg"]
        first = whole([{"image": inputs["image"][:, :64]}])[0]["sem_seg"]
        second = whole([{"image": inputs["image"][:, 40:]}])[0]["sem_seg"]
    torch.testing.assert_close(found[:, :40], first[:, :40])
    torch.testing.assert_close(found[:, 40:64], (first[:, 40:] + second[:, :24]) / 2)
    torch.testing.assert_close(found[:, 64:], second[:, 24:])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (_window_options([64, 64], [65, 64]), "would leave gaps"),
        (_window_options([64], [64]), "a height and a width"),
        (["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res5']"], "PSPHead requires two"),
        (["MODEL.PSP_HEAD.DROPOUT", "1.0"], "PSP_HEAD.DROPOUT"),
    ],
)
def test_wrong_settings_are_one_line(opts, message):
    with pytest.raises(UserError, match=message):
        load_checked_config(LEAF, opts)


def test_batch_norm_over_one_pixel_is_refused_before_training(tmp_path, capsys):
    options = ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "1", "OUTPUT_DIR", str(tmp_path)]
    assert main(["--config-file", LEAF, *options]) == 2
    assert "needs at least 2 images per pass" in capsys.readouterr().err


def test_training_images_are_scaled_then_cropped_with_their_labels(tmp_path):
    labels = np.random.default_rng(0).integers(0, 5, (120, 240)).astype(np.uint8).repeat(2, 1)
    Image.fromarray(np.stack([labels * 40] * 3, -1)).save(tmp_path / "image.png")
    Image.fromarray(labels).save(tmp_path / "labels.png")
    record = {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "height": 120,
        "width": 480,
    }
    cfg = load_config(
        LEAF,
        [
            *("INPUT.MIN_SIZE_TRAIN", "[120,120]", "INPUT.CROP.SIZE", "[64,100]"),
            *("INPUT.MAX_SIZE_TRAIN", "4096"),
        ],
    )
    mapper = build_train_mapper(cfg)
    crops = [mapper(dict(record)) for _ in range(4)]
    assert all(crop["image"].shape == (3, 64, 100) for crop in crops)
    for crop in crops:
        assert torch.equal(crop["image"][0].long(), crop["sem_seg"] * 40)
    assert len({crop["image"].sum().item() for crop in crops}) > 1
    # An image smaller than the crop is used whole; the batch is padded later.
    cfg.INPUT.MIN_SIZE_TRAIN = [60, 60]
    assert build_train_mapper(cfg)(dict(record))["image"].shape == (3, 60, 100)


def test_default_config_has_no_windows():
    from contnet.config import add_contnet_config

    cfg = get_cfg()
    add_contnet_config(cfg)
    assert cfg.TEST.SLIDING_WINDOW.ENABLED is False
