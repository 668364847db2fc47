"""Tests test-time augmentation: agreement with the plain model, and mirrored images."""

import pytest
import torch
from conftest import REPOSITORY, SMALL
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import nn
from torch.nn import functional as F

from contnet.config import load_config
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.build import build_model
from contnet.modeling.tta import DenseDetectorTTA, SemanticSegmentorTTA, tta_class
from contnet.utils.errors import UserError

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
HEIGHT, WIDTH = 64, 96  # a multiple of the network's padding, so that nothing is padded

MANY = """MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.RETINANET.SCORE_THRESH_TEST 0.0
MODEL.RPN.NMS_THRESH 0.9 MODEL.SEM_SEG_HEAD.NUM_CLASSES 5 MODEL.SEM_SEG_HEAD.CONVS_DIM 32
MODEL.ROI_HEADS.NUM_CLASSES 5 MODEL.RETINANET.NUM_CLASSES 5 TEST.DETECTIONS_PER_IMAGE 40
MODEL.FCOS.NUM_CLASSES 5 MODEL.FCOS.SCORE_THRESH_TEST 0.0 MODEL.FCOS.NORM ''
MODEL.CONTNET.NORM GN TEST.AUG.ENABLED True TEST.AUG.MAX_SIZE 400"""
TO_P7 = """MODEL.FPN.IN_FEATURES ['res3','res4','res5']
MODEL.BACKBONE.NAME build_retinanet_contnet_fpn_backbone"""
MODELS = {
    "boxes": "MODEL.META_ARCHITECTURE GeneralizedRCNN",
    "masks": "MODEL.META_ARCHITECTURE GeneralizedRCNN MODEL.MASK_ON True",
    "retinanet": f"MODEL.META_ARCHITECTURE RetinaNet {TO_P7}",
    "fcos": f"MODEL.META_ARCHITECTURE FCOS {TO_P7}",
    "semantic": "MODEL.META_ARCHITECTURE SemanticSegmentor",
    # Larger than any view.
    "windows": """MODEL.META_ARCHITECTURE WindowSegmentor TEST.SLIDING_WINDOW.ENABLED True
    TEST.SLIDING_WINDOW.SIZE [500,500] TEST.SLIDING_WINDOW.STRIDE [500,500]""",
}
SEMANTIC = ("semantic", "windows")


def config(kind, sizes="(64,)", flip=False):
    """Returns a tiny model's config with a low threshold, so that an untrained model finds much."""
    options = [*SMALL, *MANY.split(), *MODELS[kind].split()]
    return load_config(LEAF, [*options, "TEST.AUG.MIN_SIZES", sizes, "TEST.AUG.FLIP", str(flip)])


@pytest.fixture(scope="module")
def models():
    """Builds a model of each kind, with head weights large enough to distinguish places."""
    built = {}
    for kind in MODELS:
        torch.manual_seed(2)
        model = build_model(config(kind)).eval()
        for name, parameter in model.named_parameters():
            last = ("cls_score", "bbox_pred", "mask_head.predictor", "sem_seg_head.predictor")
            if parameter.ndim > 1 and any(each in name for each in last):
                nn.init.normal_(parameter, std=0.1)
        if kind == "fcos":
            # Distances are not negative: start from boxes of two strides to each side.
            nn.init.constant_(model.head.bbox_pred.bias, 2.0)
            nn.init.normal_(model.head.cls_score.weight, std=0.5)
        built[kind] = model
    return built


def augmented(models, kind, **options):
    """Returns the model with test-time augmentation."""
    cfg = config(kind, **options)
    return tta_class(cfg.MODEL.META_ARCHITECTURE)(cfg, models[kind]).eval()


def random_image(height=HEIGHT, width=WIDTH):
    """Returns an input as the data loader makes it: noise at two scales."""
    coarse = F.interpolate(torch.rand(1, 3, 6, 9), (height, width), mode="bilinear")[0]
    image = (255 * (coarse + 0.2 * torch.rand(3, height, width)).clamp(max=1)).to(torch.uint8)
    return {"image": image, "height": height, "width": width, "file_name": "x"}


def mirror(image):
    """Returns the mirrored input."""
    return {**image, "image": image["image"].flip(-1)}


def run(model, image):
    """Returns one output."""
    with torch.no_grad():
        (output,) = model([image])
    return output


def assert_same_instances(ours, theirs, atol):
    """Checks for the same detections, regardless of the order of equal scores."""
    assert len(ours) == len(theirs) > 5
    assert ours.image_size == theirs.image_size
    a, b = (x[torch.argsort(x.scores, descending=True, stable=True)] for x in (ours, theirs))
    torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=0)
    assert torch.equal(a.pred_classes, b.pred_classes)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=atol, rtol=0)
    if ours.has("pred_masks"):
        assert (a.pred_masks == b.pred_masks).float().mean() > 0.999
        assert 0 < a.pred_masks.float().mean() < 1


def mirrored_instances(instances):
    """Returns boxes and masks of the mirrored image."""
    x1, y1, x2, y2 = instances.pred_boxes.tensor.unbind(1)
    width = instances.image_size[1]
    fields = {**instances.get_fields()}
    fields["pred_boxes"] = Boxes(torch.stack([width - x2, y1, width - x1, y2], 1))
    if instances.has("pred_masks"):
        fields["pred_masks"] = instances.pred_masks.flip(-1)
    return Instances(instances.image_size, **fields)


def assert_same(ours, theirs, atol=1e-3):
    """Checks two outputs of any kind."""
    if "sem_seg" in ours:
        torch.testing.assert_close(ours["sem_seg"], theirs["sem_seg"], atol=1e-5, rtol=0)
    else:
        assert_same_instances(ours["instances"], theirs["instances"], atol)


def mirrored_output(output):
    """Returns the expected output for the mirrored image."""
    if "sem_seg" in output:
        return {"sem_seg": output["sem_seg"].flip(-1)}
    return {"instances": mirrored_instances(output["instances"])}


def probabilities(output):
    """Returns probabilities of a plain semantic model, as from the augmented one."""
    return {"sem_seg": output["sem_seg"].softmax(0)} if "sem_seg" in output else output


@pytest.mark.parametrize("kind", MODELS)
def test_one_view_of_the_test_size_is_the_plain_model(models, kind):
    """The plain model gets the resized image; the augmented one resizes it."""
    image = random_image(80, 120)
    resize = T.ResizeShortestEdge(64, 96).get_transform(image["image"].permute(1, 2, 0).numpy())
    small = resize.apply_image(image["image"].permute(1, 2, 0).numpy())
    plain = {**image, "image": torch.from_numpy(small.transpose(2, 0, 1).copy())}
    assert plain["image"].shape[1:] == (HEIGHT, WIDTH)
    expected = probabilities(run(models[kind], plain))
    assert_same(run(augmented(models, kind), image), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_mirrored_image_gives_the_mirrored_output(models, kind):
    image = random_image()
    model = augmented(models, kind, flip=True)
    output = run(model, image)
    assert_same(run(model, mirror(image)), mirrored_output(output))
    # The plain model's are not equal.
    plain = run(models[kind], mirror(image))
    with pytest.raises(AssertionError):
        assert_same(probabilities(plain), mirrored_output(probabilities(run(models[kind], image))))


@pytest.mark.parametrize("kind", ["boxes", "retinanet", "fcos"])
def test_boxes_are_suppressed_over_all_views(models, kind):
    image = random_image()
    one, many = (
        run(augmented(models, kind, sizes=sizes, flip=flip), image)["instances"]
        for sizes, flip in (("(64,)", False), ("(64, 96)", True))
    )
    assert len(many) <= 40
    assert many.scores.sum() > one.scores.sum()
    for index in many.pred_classes.unique():
        boxes = many.pred_boxes[many.pred_classes == index]
        overlaps = pairwise_iou(boxes, boxes).fill_diagonal_(0)
        assert overlaps.max() <= (0.6 if kind == "fcos" else 0.5) + 1e-4


def test_probabilities_are_the_mean_over_views(models):
    image = random_image()
    views = []
    for height, width in ((64, 96), (96, 144)):
        array = image["image"].permute(1, 2, 0).numpy()
        resized = T.ResizeTransform(HEIGHT, WIDTH, height, width).apply_image(array)
        for flip in (False, True):
            view = {**image, "image": torch.from_numpy(resized.transpose(2, 0, 1).copy())}
            found = run(models["semantic"], mirror(view) if flip else view)["sem_seg"].softmax(0)
            views.append(found.flip(-1) if flip else found)
    found = run(augmented(models, "semantic", sizes="(64, 96)", flip=True), image)["sem_seg"]
    torch.testing.assert_close(found, sum(views) / 4, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sum(0), torch.ones(HEIGHT, WIDTH))
    assert (views[0] - views[1]).abs().max() > 0.01


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in SEMANTIC])
def test_nothing_found(models, kind, monkeypatch):
    model = augmented(models, kind, sizes="(64, 96)", flip=True)
    if kind in ("retinanet", "fcos"):
        monkeypatch.setattr(model.model, "test_score_thresh", 1.0)
    else:
        monkeypatch.setattr(model.model.roi_heads.box_predictor, "test_score_thresh", 1.0)
    found = run(model, random_image())["instances"]
    assert len(found) == 0
    assert found.image_size == (HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", MODELS)
def test_mixed_precision(models, kind):
    model = augmented(models, kind, sizes="(64, 96)", flip=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(model, random_image())
    if kind in SEMANTIC:
        assert output["sem_seg"].dtype == torch.float32
    else:
        assert len(output["instances"]) > 5


# --- exact places, with a model that knows the answer --------------------------------------------


class BrightRectangle(nn.Module):
    """Finds the only bright rectangle exactly, and separates bright from dark pixels."""

    test_nms_thresh = 0.5
    max_detections_per_image = 10

    def forward(self, batch):
        return [self.find(**image) for image in batch]

    def find(self, image, height, width, **_):
        bright = image[0] > 127
        ys, xs = torch.nonzero(bright, as_tuple=True)
        scale = torch.tensor([width / image.shape[2], height / image.shape[1]]).repeat(2)
        corners = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
        instances = Instances(
            (height, width),
            pred_boxes=Boxes((corners * scale)[None]),
            scores=torch.tensor([1 - 1 / image.shape[2]]),
            pred_classes=torch.tensor([3]),
        )
        logits = torch.stack([bright, ~bright]).float()
        logits = F.interpolate(logits[None], (height, width), mode="nearest")[0]
        return {"instances": instances, "sem_seg": 100 * logits}


@pytest.fixture
def rectangle():
    """Draws an image whose rectangle is far from its centre."""
    image = torch.zeros(3, 60, 100, dtype=torch.uint8)
    image[:, 10:30, 5:45] = 255
    return {"image": image, "height": 60, "width": 100, "file_name": "x"}


def test_places_are_kept_to_the_pixel(rectangle):
    cfg = config("retinanet", sizes="(60, 120)", flip=True)
    found = run(DenseDetectorTTA(cfg, BrightRectangle()), rectangle)["instances"]
    assert found.pred_boxes.tensor.tolist() == [[5, 10, 45, 30]]
    assert found.pred_classes.tolist() == [3]
    probability = run(SemanticSegmentorTTA(cfg, BrightRectangle()), rectangle)["sem_seg"]
    expected = rectangle["image"][0] > 127
    assert torch.equal(probability.argmax(0) == 0, expected)


# --- unsupported models --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("MODEL.META_ARCHITECTURE PanopticFPN", "no test-time augmentation for PanopticFPN"),
        ("MODEL.META_ARCHITECTURE ProposalNetwork", "for ProposalNetwork"),
        ("MODEL.KEYPOINT_ON True", "MODEL.KEYPOINT_ON"),
        ("MODEL.LOAD_PROPOSALS True", "MODEL.LOAD_PROPOSALS"),
        ("TEST.AUG.MIN_SIZES ()", r"TEST\.AUG\.MIN_SIZES is \(\)"),
        ("TEST.AUG.MIN_SIZES (0,400)", r"TEST\.AUG\.MIN_SIZES is \(0, 400\)"),
    ],
)
def test_refused_when_the_config_is_read(options, said):
    load_checked_config(LEAF, options.split())
    with pytest.raises(UserError, match=said):
        load_checked_config(LEAF, [*options.split(), "TEST.AUG.ENABLED", "True"])
