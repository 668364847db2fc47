"""Tests the drawn data set: valid COCO, exact masks, promised contents, and how it is made."""

import itertools
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cityscapesscripts.helpers.labels import name2label
from detectron2.config import get_cfg
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from contnet.data.datasets import shapes
from contnet.data.datasets import shapes_drawing as drawing
from contnet.data.datasets.register import register_datasets
from contnet.data.datasets.shapes import ShapesConfig, make_shapes, shapes_datasets
from contnet.data.datasets.shapes_cityscapes import SHAPE_LABELS, shapes_to_cityscapes
from contnet.data.datasets.shapes_drawing import CLASS_NAMES, MIN_VISIBLE, draw_picture
from contnet.utils.errors import UserError

pytestmark = pytest.mark.numpy1
SMALL = ShapesConfig(num_train=24, num_val=8)
TINY = ShapesConfig(num_train=2, num_val=2, min_side=128, max_side=140)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", SMALL)


@pytest.fixture(scope="module", params=["train", "val"])
def coco(request, root):
    loaded = COCO(str(root / "annotations" / f"instances_{request.param}.json"))
    loaded.folder = root / request.param
    return loaded


@pytest.fixture
def catalogs(monkeypatch):
    """Provides Detectron2's catalogs, empty for one test."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    monkeypatch.setattr(DatasetCatalog, "data", {})
    monkeypatch.setattr(MetadataCatalog, "data", {})
    return DatasetCatalog, MetadataCatalog


def annotation_bytes(root):
    return [path.read_bytes() for path in sorted((root / "annotations").iterdir())]


def image_bytes(root, split):
    return [path.read_bytes() for path in sorted((root / split).iterdir())]


# ---- contents


def test_images_are_as_listed(coco):
    names = {path.name for path in coco.folder.iterdir()}
    assert names == {info["file_name"] for info in coco.imgs.values()}
    for info in coco.imgs.values():
        with Image.open(coco.folder / info["file_name"]) as image:
            assert image.mode == "RGB"
            assert image.size == (info["width"], info["height"])
        assert SMALL.min_side <= min(info["width"], info["height"])
        assert max(info["width"], info["height"]) <= SMALL.max_side
    assert len({(info["width"], info["height"]) for info in coco.imgs.values()}) > 4


def test_number_of_images(root):
    assert len(image_bytes(root, "train")) == SMALL.num_train
    assert len(image_bytes(root, "val")) == SMALL.num_val


def test_boxes_areas_and_masks_agree(coco):
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation).astype(bool)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y, width, height = annotation["bbox"]
        assert (x, x + width) == (columns[0], columns[-1] + 1)
        assert (y, y + height) == (rows[0], rows[-1] + 1)
        assert annotation["area"] == mask.sum()
        assert annotation["iscrowd"] == 0


def test_masks_of_an_image_are_disjoint(coco):
    for image_id in coco.imgs:
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        assert 3 <= len(annotations) <= 8
        assert np.sum([coco.annToMask(a) for a in annotations], axis=0).max() == 1


def test_ids_are_unique_and_positive(coco):
    for entries in (coco.dataset["images"], coco.dataset["annotations"]):
        ids = [entry["id"] for entry in entries]
        assert len(set(ids)) == len(ids) and min(ids) == 1


def test_classes(coco):
    names = [coco.cats[i]["name"] for i in sorted(coco.cats)]
    assert tuple(names) == CLASS_NAMES and len(names) >= 4
    assert {a["category_id"] for a in coco.anns.values()} == set(coco.cats)


def test_sizes(coco):
    longest = [max(annotation["bbox"][2:]) for annotation in coco.anns.values()]
    assert 20 <= min(longest) < 40
    assert 80 < max(longest) <= 100


def test_objects_hide_each_other_but_stay_visible():
    hidden = 0
    for number in range(8):
        _, objects = drawing.draw_picture(
            np.random.default_rng(number), SMALL.min_side, SMALL.max_side
        )
        shares = [thing.visible.sum() / thing.full_area for thing in objects]
        assert min(shares) >= MIN_VISIBLE
        hidden += sum(share < 0.95 for share in shares)
    assert hidden >= 8


@pytest.mark.parametrize(
    ("height", "width", "full_area", "enough"),
    [(20, 9, 180, True), (19, 19, 361, False), (20, 20, 666, True), (20, 20, 667, False)],
)
def test_what_counts_as_visible(height, width, full_area, enough):
    visible = np.zeros((40, 40), bool)
    visible[3 : 3 + height, 5 : 5 + width] = True
    assert drawing.ShapeObject(0, visible, full_area).shows_enough() == enough


def test_boxes_overlap(coco):
    overlapping = 0
    for image_id in coco.imgs:
        boxes = [np.array(a["bbox"], float) for a in coco.loadAnns(coco.getAnnIds(image_id))]
        for first, second in itertools.combinations(boxes, 2):
            overlapping += coco_mask.iou(first[None], second[None], [0]).item() > 0.1
    assert overlapping >= len(coco.imgs) / 2


def test_an_object_looks_other_than_its_surroundings(coco):
    """The labels are at the objects: colours change at the borders of the masks."""
    inside, outside = [], []
    for annotation in coco.anns.values():
        info = coco.imgs[annotation["image_id"]]
        image = np.asarray(Image.open(coco.folder / info["file_name"])).astype(float)
        mask = coco.annToMask(annotation).astype(bool)
        left = mask[:, 3:] & ~mask[:, :-3]
        if left.any():
            outside.append(np.abs(image[:, 3:] - image[:, :-3])[left].mean())
        both = mask[:, 3:] & mask[:, :-3]
        inside.append(np.abs(image[:, 3:] - image[:, :-3])[both].mean())
    assert np.median(outside) > 2.5 * np.median(inside)


def _registering(root):
    cfg = get_cfg()
    cfg.DATASETS.REGISTER = shapes_datasets(root)
    return cfg


def test_loads_in_detectron2(root, catalogs):
    register_datasets(_registering(root))
    for split, count in (("train", SMALL.num_train), ("val", SMALL.num_val)):
        records = catalogs[0].get(f"shapes_{split}")
        loaded = Counter(a["category_id"] for record in records for a in record["annotations"])
        written = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        assert len(records) == count
        assert loaded == Counter(a["category_id"] - 1 for a in written["annotations"])
        assert all(a["segmentation"] for record in records for a in record["annotations"])


# ---- polygons


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_polygons_cover_any_mask_exactly(share):
    """Noise has holes, islands in holes, and pixels that touch at corners."""
    rng = np.random.default_rng(1)
    for height, width in [(1, 1), (1, 9), (7, 2), (16, 16), (23, 17)]:
        mask = rng.random((height, width)) < share
        mask[0, 0] = True
        polygons = [loop.ravel().tolist() for loop in drawing.mask_polygons(mask)]
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), mask)


def test_a_ring_is_cut_through_its_hole():
    mask = np.ones((9, 9), bool)
    mask[3:6, 3:6] = False
    assert len(drawing.mask_polygons(mask)) == 2


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_outline_fills_its_circle_and_turns(name):
    upright = drawing.draw_outline(name, 60.0, 0.0, np.zeros(2))
    turned = drawing.draw_outline(name, 60.0, 0.5, np.zeros(2))
    assert upright.shape == (64, 64) and upright.min() >= 0 and upright.max() == 1
    assert upright.sum() == pytest.approx(turned.sum(), rel=0.02)
    rows = np.flatnonzero((upright >= 0.5).any(1))
    assert 56 <= 2 * (32 - rows[0]) <= 60


# ---- creation


def test_same_seed_same_bytes(tmp_path):
    first, second = make_shapes(tmp_path / "a", TINY), make_shapes(tmp_path / "b", TINY)
    assert annotation_bytes(first) == annotation_bytes(second)
    for split in ("train", "val"):
        assert image_bytes(first, split) == image_bytes(second, split)


def test_other_seed_other_images(tmp_path):
    first, second = make_shapes(tmp_path / "a", TINY), make_shapes(tmp_path / "b", TINY, seed=1)
    for one, other in zip(annotation_bytes(first), annotation_bytes(second), strict=True):
        assert json.loads(one)["annotations"] != json.loads(other)["annotations"]
    assert not set(image_bytes(first, "train")) & set(image_bytes(second, "train"))


def test_validation_images_are_other_images(root):
    assert not set(image_bytes(root, "train")) & set(image_bytes(root, "val"))


def test_images_do_not_depend_on_their_number(tmp_path):
    few, more = make_shapes(tmp_path / "a", TINY), make_shapes(tmp_path / "b", TINY, num_train=3)
    assert image_bytes(few, "train") == image_bytes(more, "train")[:2]


def test_made_once(tmp_path, monkeypatch):
    root = make_shapes(tmp_path / "shapes", TINY)
    monkeypatch.setattr(shapes, "draw_picture", None)
    assert make_shapes(root, TINY) == root


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    assert image_bytes(make_shapes(tmp_path / "empty", TINY), "val")
    assert image_bytes(make_shapes(tmp_path / "new" / "shapes", TINY), "val")


@pytest.mark.parametrize("killed", [False, True])
def test_interrupted_making_leaves_nothing_that_passes_for_a_set(tmp_path, monkeypatch, killed):
    """If `killed`, there is no clean-up."""
    drawn = []

    def interrupted(*args):
        if len(drawn) == TINY.num_train:
            raise KeyboardInterrupt
        drawn.append(draw_picture(*args))
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "draw_picture", interrupted)
        if killed:
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            make_shapes(tmp_path / "shapes", TINY)
    assert len(list(tmp_path.iterdir())) == killed
    assert not (tmp_path / "shapes").exists()
    assert len(image_bytes(make_shapes(tmp_path / "shapes", TINY), "val")) == TINY.num_val


def test_the_faster_process_wins(tmp_path, monkeypatch):
    """Another process makes the whole set while this one is drawing."""

    def overtaken(*args):
        monkeypatch.setattr(shapes, "draw_picture", draw_picture)
        make_shapes(tmp_path / "shapes", TINY)
        return draw_picture(*args)

    monkeypatch.setattr(shapes, "draw_picture", overtaken)
    root = make_shapes(tmp_path / "shapes", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert len(image_bytes(root, "train")) == TINY.num_train


def test_many_at_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        roots = list(pool.map(lambda _: make_shapes(tmp_path / "shapes", TINY), range(4)))
    assert set(roots) == {tmp_path / "shapes"} == set(tmp_path.iterdir())


def test_other_parameters_are_refused(tmp_path):
    root = make_shapes(tmp_path / "shapes", TINY)
    before = annotation_bytes(root)
    with pytest.raises(UserError, match=r"seed 0.*seed 3") as caught:
        make_shapes(root, TINY, seed=3)
    assert "\n" not in str(caught.value)
    assert annotation_bytes(root) == before


@pytest.mark.parametrize("lost", ["train/000002.jpg", "annotations/instances_val.json"])
def test_a_set_that_lost_files_is_refused(tmp_path, lost):
    root = make_shapes(tmp_path / "shapes", TINY)
    (root / lost).unlink()
    with pytest.raises(UserError, match=r"lacks files of its (train|val) split"):
        make_shapes(root, TINY)


def test_a_foreign_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="not a shapes data set"):
        make_shapes(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make_shapes(tmp_path / "file" / "shapes", TINY)


@pytest.mark.parametrize(
    "bad", [{"num_train": 0}, {"min_side": 100}, {"min_side": 200, "max_side": 190}, {"seed": -1}]
)
def test_bad_parameters(tmp_path, bad):
    with pytest.raises(UserError):
        make_shapes(tmp_path / "shapes", **bad)
    with pytest.raises(TypeError):
        make_shapes(tmp_path / "shapes", sides=3)
    assert not list(tmp_path.iterdir())


# ---- registration


def test_datasets_are_registered_by_their_paths(root, catalogs):
    datasets, metadata = catalogs
    register_datasets(_registering(root))
    register_datasets(_registering(str(root)))
    assert set(datasets.list()) - {"imagenet_train", "imagenet_val"} == {
        "shapes_train",
        "shapes_val",
    }
    assert len(datasets.get("shapes_val")) == SMALL.num_val
    assert tuple(metadata.get("shapes_val").thing_classes) == CLASS_NAMES
    assert metadata.get("shapes_train").evaluator_type == "coco"


# ---- as Cityscapes


def test_cityscapes_labels_lie_where_the_shapes_are(coco, root, tmp_path):
    shapes_to_cityscapes(root, tmp_path)
    split, classes = coco.folder.name, [name2label[label].id for label in SHAPE_LABELS]
    for image_id, info in coco.imgs.items():
        stem = f"{split}/shapes/shapes_{image_id:06d}_000019"
        start = tmp_path / "cityscapes" / "gtFine" / f"{stem}_gtFine"
        found, objects = (
            np.asarray(Image.open(f"{start}_{kind}Ids.png")) for kind in ("label", "instance")
        )
        picture = tmp_path / "cityscapes" / "leftImg8bit" / f"{stem}_leftImg8bit.png"
        np.testing.assert_array_equal(
            np.asarray(Image.open(picture)), np.asarray(Image.open(coco.folder / info["file_name"]))
        )
        expected = np.full(found.shape, name2label["road"].id)
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        for each in annotations:
            expected[coco.annToMask(each).astype(bool)] = classes[each["category_id"] - 1]
        # Cityscapes' polygons run through pixel centres, COCO's along pixel edges.
        assert (found == expected).mean() > 0.97
        assert set(objects[found != name2label["road"].id] // 1000) <= set(classes)
        assert len(np.unique(objects)) > len(annotations)
    with pytest.raises(UserError, match="give another folder"):
        shapes_to_cityscapes(root, tmp_path)
