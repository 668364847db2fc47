"""The doctor and the check before training: every kind of damage, and what they must let pass."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from conftest import REPOSITORY
from detectron2.data import MetadataCatalog
from PIL import Image

from contnet.commands.doctor import main
from contnet.data.datasets.cityscapes_labels import prepare_cityscapes
from contnet.data.datasets.shapes import make_shapes
from contnet.data.findings import ERROR, NOTE, SHOWN, Findings
from contnet.data.validation import dataset as checks
from contnet.data.validation.coco import DatasetUse, check_instances
from contnet.launch.arguments import configure, parse_arguments
from contnet.utils.errors import UserError

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("drawn") / "set", num_train=4, num_val=2)


pytestmark = pytest.mark.usefixtures("forget_datasets")


# --- COCO ----------------------------------------------------------------------------------------


class Copy:
    """A copy of the drawn set whose training split may be damaged.

    Attributes:
        root: its folder.
        content: of the annotation file, written by :meth:`options`.
    """

    def __init__(self, root: Path):
        self.root = root
        self.content = json.loads(self.file.read_text())

    @property
    def file(self) -> Path:
        return self.root / "annotations" / "instances_train.json"

    @property
    def item(self) -> dict:
        return self.content["annotations"][0]

    def image(self, number: int = 0) -> Path:
        return self.root / "train" / self.content["images"][number]["file_name"]

    def options(self) -> list[str]:
        self.file.write_text(json.dumps(self.content))
        sets = [
            [
                split,
                str(self.root / "annotations" / f"instances_{split}.json"),
                str(self.root / split),
            ]
            for split in ("train", "val")
        ]
        return [
            *("DATASETS.REGISTER", str(sets)),
            *("DATASETS.TRAIN", "('train',)", "DATASETS.TEST", "('val',)"),
        ]


@pytest.fixture
def data(drawn, tmp_path) -> Copy:
    return Copy(Path(shutil.copytree(drawn, tmp_path / "set")))


def _doctor(capsys, *options: str) -> tuple[int, list[str]]:
    status = main(["--config-file", LEAF, "--workers", "2", *options])
    printed = capsys.readouterr()
    return status, (printed.out + printed.err).splitlines()


def _set(*path: str | int, to: object) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        node = data.content
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = to

    return change


def _item(key: str, to: object) -> Callable[[Copy], None]:
    return _set("annotations", 0, key, to=to)


def _drop(*path: str | int) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        node = data.content
        for part in path[:-1]:
            node = node[part]
        del node[path[-1]]

    return change


def _twice(key: str) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        data.content[key].append(copy.deepcopy(data.content[key][0]))

    return change


def _every_box_relative(data: Copy) -> None:
    for item in data.content["annotations"]:
        item["bbox"] = [0.1, 0.2, 0.3, 0.4]


def _all_crowds(data: Copy) -> None:
    for item in data.content["annotations"]:
        item["iscrowd"] = 1


def _rle_of_another_size(data: Copy) -> None:
    data.item["segmentation"] = {"size": [9, 9], "counts": [81]}


def _two_points_of_many(data: Copy) -> None:
    data.item["segmentation"].append([1, 2, 3, 4])


def _short_rle(data: Copy) -> None:
    image = data.content["images"][0]
    size = [image["height"], image["width"]]
    mask = mask_util.encode(np.zeros(size, np.uint8, order="F"))
    data.item["segmentation"] = {"size": size, "counts": mask["counts"].decode()[:-1]}


STRUCTURE = {
    "no images": (_drop("images"), "'images'"),
    "images are no list": (_set("images", to={}), "'images'"),
    "empty images": (_set("images", to=[]), "lists no image"),
    "no annotations": (_drop("annotations"), "'annotations'"),
    "image without name": (_drop("images", 0, "file_name"), "file_name"),
    "image without size": (_drop("images", 0, "width"), "width and height"),
    "image id twice": (_twice("images"), "image ids that occur twice: 1 [1]"),
    "ids of two types": (_set("images", 0, "id", to="x"), "image ids are numbers"),
    "annotation id twice": (_twice("annotations"), "annotation ids that occur twice: 1 [1]"),
    "unknown image": (_item("image_id", 99), "images that the file does not list"),
    "unknown category": (_item("category_id", 99), "categories that the file does not list"),
    "no category": (_drop("annotations", 0, "category_id"), "annotations without category_id"),
    "no box": (_drop("annotations", 0, "bbox"), "not 4 finite"),
    "empty box": (_item("bbox", []), "not 4 finite"),
    "NaN in a box": (_item("bbox", [1, 2, float("nan"), 4]), "not 4 finite"),
    "text in a box": (_item("bbox", [1, 2, "3", 4]), "not 4 finite"),
    "no area": (_item("bbox", [5, 5, 0, 9]), "boxes without area"),
    "negative width": (_item("bbox", [50, 50, -20, 9]), "negative width or height"),
    "outside": (_item("bbox", [5000, 5, 10, 10]), "boxes wholly outside their image"),
    "corners": (_item("bbox", [100, 100, 900, 120]), "boxes far larger than their image"),
    "relative": (_every_box_relative, "all boxes lie between 0 and 1"),
    "crowds alone": (_all_crowds, "no object to train on"),
    "ignore": (_item("ignore", 1), 'annotations with "ignore"'),
    "iscrowd is a text": (_item("iscrowd", "0"), "iscrowd is neither"),
    "iscrowd is null": (_item("iscrowd", None), "iscrowd is neither"),
    "odd polygon": (_item("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "an odd number"),
    "two points": (_item("segmentation", [[1, 2, 3, 4]]), "fewer than 3 points"),
    "flat polygon": (_item("segmentation", [1, 2, 3, 4, 5, 6]), "polygons that are no lists"),
    "text in a polygon": (_item("segmentation", [[1, 2, "3", 4, 5, 6]]), "polygons that are no"),
    "NaN in a polygon": (
        _item("segmentation", [[1, 2, float("nan"), 4, 5, 6]]),
        "polygons that are no lists",
    ),
    "far polygon": (_item("segmentation", [[1, 2, 9000, 4, 5, 6]]), "reach far outside"),
    "mask is a text": (_item("segmentation", "mask"), "neither polygons nor run-length"),
    "mask of another size": (_rle_of_another_size, "do not fit their image's size"),
    "mask cut off": (_short_rle, "do not fit their image's size"),
}


@pytest.mark.parametrize("damage", STRUCTURE)
def test_damaged_annotations(data, capsys, damage):
    """Both tell it: the doctor with the rest, the check before training as the one error."""
    change, said = STRUCTURE[damage]
    change(data)
    # The number of classes is given, so that only the data can be wrong.
    options = [*data.options(), "MODEL.ROI_HEADS.NUM_CLASSES", "4"]
    status, lines = _doctor(capsys, *options)
    assert status == 1
    errors = [line for line in lines if line.startswith("  ERROR")]
    assert any(said in line for line in errors), lines
    assert lines[-1].endswith("this would stop or corrupt training")
    cfg = configure(parse_arguments(["--config-file", LEAF, *options]))
    with pytest.raises(UserError) as raised:
        checks.check_datasets(cfg, ["train", "val"])
    assert "data set train: " in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop("categories"), "'categories' must be there"),
        (_set("categories", to=[]), "has no categories"),
        (_twice("categories"), "category id 1 occurs twice"),
        (_set("categories", 0, to={"id": "a", "name": "x"}), "each category must have"),
    ],
)
def test_damaged_categories(data, capsys, change, said):
    change(data)
    for more in ([], ["MODEL.ROI_HEADS.NUM_CLASSES", "4"]):
        status, lines = _doctor(capsys, *data.options(), *more)
        assert status == 1
        assert any(said in line for line in lines), lines


def _remove(data: Copy) -> None:
    data.image().unlink()


def _truncate(data: Copy) -> None:
    data.image().write_bytes(data.image().read_bytes()[:900])


def _no_image(data: Copy) -> None:
    data.image().write_text("<html>not found</html>")


def _other_size(data: Copy) -> None:
    Image.open(data.image()).resize((130, 140)).save(data.image())


def _dangling(data: Copy) -> None:
    data.image().unlink()
    data.image().symlink_to(data.root / "elsewhere.jpg")


def _folder(data: Copy) -> None:
    data.image().unlink()
    data.image().mkdir()


def _deep(data: Copy) -> None:
    image = data.content["images"][0]
    pixels = np.full((image["height"], image["width"]), 3000, np.uint16)
    Image.fromarray(pixels).save(data.image(), format="PNG")


def _turned(orientation: int, turn_sizes: bool) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        image = Image.new("RGB", (150, 200))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(data.image(), exif=exif)
        width, height = (200, 150) if turn_sizes else (150, 200)
        data.content["images"][0] |= {"width": width, "height": height}
        data.content["annotations"] = [
            item for item in data.content["annotations"] if item["image_id"] != 1
        ]

    return change


PIXELS = {
    "missing": (_remove, "images that are missing"),
    "link to nowhere": (_dangling, "images that are missing"),
    "folder": (_folder, "images that are missing"),
    "16 bits": (_deep, "more than 8 bits"),
    "truncated": (_truncate, "cannot be read"),
    "no image": (_no_image, "cannot be read"),
    "other size": (_other_size, "another size"),
    "turned by EXIF": (_turned(6, False), "EXIF orientation"),
}


@pytest.mark.parametrize("damage", PIXELS)
def test_damaged_images(data, capsys, damage):
    change, said = PIXELS[damage]
    change(data)
    status, lines = _doctor(capsys, *data.options())
    assert status == 1
    (line,) = [line for line in lines if line.startswith("  ERROR")]
    assert said in line
    assert data.image().name in line


def _linked(data: Copy) -> None:
    shutil.move(data.image(), data.root / "elsewhere.jpg")
    data.image().symlink_to(data.root / "elsewhere.jpg")


def _as_png(mode: str) -> Callable[[Copy], None]:
    def change(data: Copy) -> None:
        Image.open(data.image()).convert(mode).save(data.image(), format="PNG")

    return change


def _some_image_empty(data: Copy) -> None:
    data.content["annotations"] = [
        item for item in data.content["annotations"] if item["image_id"] != 1
    ]


def _fewer_images(data: Copy) -> None:
    data.content["images"].pop(0)
    _some_image_empty(data)


def _class_without_objects(data: Copy) -> None:
    data.content["annotations"] = [
        item for item in data.content["annotations"] if item["category_id"] != 2
    ]


def _crowd_masks(data: Copy) -> None:
    image = data.content["images"][0]
    size = [image["height"], image["width"]]
    data.item["iscrowd"] = 1
    data.item["segmentation"] = {"size": size, "counts": [20, 30, size[0] * size[1] - 50]}
    mask = np.zeros(size, np.uint8, order="F")
    mask[10:90, 20:99:3] = 1
    other = data.content["annotations"][1]
    other["segmentation"] = mask_util.encode(mask)
    other["segmentation"]["counts"] = other["segmentation"]["counts"].decode()


def _bare(data: Copy) -> None:
    del data.content["info"], data.content["licenses"]
    for item in data.content["annotations"]:
        for key in ("segmentation", "area", "iscrowd"):
            item.pop(key)
        item["keypoints"] = [3, 3, 2]


HARMLESS = {
    "nothing": (lambda data: None, ""),
    "subset": (_fewer_images, ""),
    "no file of an image is listed": (lambda data: data.content["images"].pop(), ""),
    "image without objects": (_some_image_empty, "1 of 4 images have no objects"),
    "class without objects": (_class_without_objects, "classes without objects: 1 [square]"),
    "same file twice": (
        lambda data: data.content["images"].append({**data.content["images"][0], "id": 9}),
        "listed twice",
    ),
    "box over the edge": (_item("bbox", [-9, -9, 20, 20]), "boxes that reach outside"),
    "polygon over the edge": (_item("segmentation", [[-3, 2, 30, 4, 5, 60]]), ""),
    "EXIF, as annotated": (_turned(6, True), "annotations must be for the turned ones"),
    "EXIF upside down": (_turned(3, False), "annotations must be for the turned ones"),
    "run-length masks": (_crowd_masks, ""),
    "link": (_linked, ""),
    **{f"mode {mode}": (_as_png(mode), "") for mode in ("L", "LA", "P", "RGBA")},
    "boxes, no masks, keypoints": (_bare, ""),
    "names twice": (_set("categories", 0, "name", to="square"), "have the same name"),
}


@pytest.mark.parametrize("oddity", HARMLESS)
def test_harmless(data, drawn, capsys, oddity):
    change, said = HARMLESS[oddity]
    if "no file" in oddity:
        _drop_objects_of_last(data)
    change(data)
    options = data.options()
    if oddity == "names twice":  # both files must have the same classes
        sets = [[split, str(data.file), str(data.root / "train")] for split in ("train", "val")]
        options += ["DATASETS.REGISTER", str(sets)]
    status, lines = _doctor(capsys, *options)
    assert status == 0, lines
    assert not any("ERROR" in line for line in lines)
    if said:
        assert any(line.startswith("  NOTE") and said in line for line in lines), lines
    elif oddity == "nothing":
        assert lines[-1].startswith("0 errors, ")
        assert lines[-1].endswith(": training can start")
    cfg = configure(parse_arguments(["--config-file", LEAF, *options]))
    checks.check_datasets(cfg, ["train", "val"])


def _drop_objects_of_last(data: Copy) -> None:
    last = data.content["images"][-1]["id"]
    data.content["annotations"] = [
        item for item in data.content["annotations"] if item["image_id"] != last
    ]


def test_evaluation_needs_area_and_iscrowd(data, capsys):
    _bare(data)
    options = [*data.options(), "DATASETS.TEST", "('train',)"]
    status, lines = _doctor(capsys, *options)
    assert status == 1
    assert any("without area, iscrowd" in x for x in lines)


@pytest.mark.parametrize("area", ["12", None, float("nan"), -1])
def test_evaluation_needs_areas_that_are_numbers(data, capsys, area):
    data.item["area"] = area
    assert _doctor(capsys, *data.options())[0] == 0
    status, lines = _doctor(capsys, *data.options(), "DATASETS.TEST", "('train',)")
    assert status == 1
    assert any("area is no number" in x for x in lines)


def _crowd_without_mask(data: Copy) -> None:
    data.item["iscrowd"] = 1
    del data.item["segmentation"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_crowd_without_mask, "objects without a mask"),
        (_two_points_of_many, "which evaluation takes wrongly"),
    ],
)
def test_evaluation_of_masks_needs_all_of_them(data, capsys, change, said):
    change(data)
    masks = ["DATASETS.TEST", "('train',)", "MODEL.MASK_ON", "True"]
    status, lines = _doctor(capsys, *data.options(), *masks)
    assert status == 1
    assert any("ERROR" in line and said in line for line in lines), lines
    for options in ([], masks[:2], masks[2:]):
        assert not any(said in line for line in _doctor(capsys, *data.options(), *options)[1])


def test_id_0_is_noted_where_it_is_evaluated(data, capsys):
    data.item["id"] = 0
    assert not any("id 0" in line for line in _doctor(capsys, *data.options())[1])
    status, lines = _doctor(capsys, *data.options(), "DATASETS.TEST", "('train',)")
    assert status == 0
    assert any("NOTE" in line and "annotation id 0" in line for line in lines)


def test_masks_as_the_config_wants_them(data, capsys):
    _crowd_masks(data)
    options = [*data.options(), "MODEL.MASK_ON", "True"]
    status, lines = _doctor(capsys, *options)
    assert status == 1
    assert any("INPUT.MASK_FORMAT" in x for x in lines)
    assert _doctor(capsys, *options, "INPUT.MASK_FORMAT", "bitmask")[0] == 0


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("more", [0, 1])
def test_compressed_masks_that_fit_and_that_do_not(data, share, more):
    """`more`: pixels of the mask that its image has not."""
    image = data.content["images"][0]
    size = [image["height"], image["width"]]
    pixels = np.random.default_rng(0).random((size[0] * size[1] + more, 1)) < share
    mask = mask_util.encode(np.asfortranarray(pixels.astype(np.uint8)))
    data.item["segmentation"] = {"size": size, "counts": mask["counts"].decode()}
    findings = Findings()
    check_instances(data.content, DatasetUse(True, False, masks=True, bitmasks=True), findings)
    assert [line.startswith("run-length masks") for line in findings.lines(ERROR)] == [True] * more


def test_few_lost_objects_of_many_are_a_note(data):
    """COCO's own file has two boxes without area."""
    use = DatasetUse(trained=True, evaluated=False, masks=False, bitmasks=False)
    data.item["bbox"] = [5, 5, 9, 0]
    for total, severity in ((999, ERROR), (1000, NOTE)):
        content = copy.deepcopy(data.content)
        more = [
            {**copy.deepcopy(content["annotations"][1]), "id": 100 + n}
            for n in range(total - len(content["annotations"]))
        ]
        content["annotations"] += more
        findings = Findings()
        check_instances(content, use, findings)
        (line,) = findings.lines(severity)
        assert line.startswith("boxes without area")


def test_examples_are_counted(data, capsys):
    for item in data.content["annotations"][:8]:
        item["category_id"] = 50
    _, lines = _doctor(capsys, *data.options())
    (line,) = [line for line in lines if "does not list" in line]
    assert ": 8 [annotation 1 of image 1; " in line
    assert line.endswith("; ... and 3 more]")
    assert line.count("; annotation") == SHOWN - 1


@pytest.mark.parametrize("gone", ["annotations/instances_val.json", "val"])
def test_missing_parts(data, capsys, gone):
    options = data.options()
    shutil.move(data.root / gone, data.root / "elsewhere")
    status, lines = _doctor(capsys, *options)
    assert status == 1
    (line,) = [line for line in lines if "ERROR" in line]
    assert f"{data.root / gone} does not exist" in line


def test_cut_json(data, capsys):
    options = data.options()
    data.file.write_text(data.file.read_text()[:-50])
    assert "is not valid JSON" in _doctor(capsys, *options)[1][0]
    status, lines = _doctor(capsys, *options, "MODEL.ROI_HEADS.NUM_CLASSES", "4")
    assert status == 1
    assert any("ERROR" in line and "is not valid JSON" in line for line in lines)


def test_config_mistakes_are_one_line(capsys):
    no_sets = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
    for options in (["A.B", "1"], no_sets, ["--worker"], ["--workers", "0"]):
        status, lines = _doctor(capsys, *options)
        assert status == 1
        assert len(lines) == 1
        assert lines[0].startswith("error: ")


def test_unknown_names_and_wrong_numbers(data, capsys):
    options = [*data.options(), "DATASETS.TEST", "('vall',)"]
    status, lines = _doctor(capsys, *options)
    assert status == 1
    assert any("it is not registered" in line and "did you mean val" in line for line in lines)
    status, lines = _doctor(capsys, *data.options(), "MODEL.ROI_HEADS.NUM_CLASSES", "80")
    said = "it has 4 classes, but MODEL.ROI_HEADS.NUM_CLASSES is 80: set it to 4"
    assert (status, sum(said in line for line in lines)) == (1, 2)


def test_built_in_names_keep_their_classes(data, capsys, monkeypatch):
    """Three images in COCO's place, with other categories: Detectron2 would stop."""
    data.options()
    metadata = MetadataCatalog.get("coco_2017_val")
    monkeypatch.setitem(vars(metadata), "json_file", str(data.file))
    monkeypatch.setitem(vars(metadata), "image_root", str(data.root / "train"))
    options = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "('coco_2017_val',)"]
    status, lines = _doctor(capsys, *options)
    assert status == 1
    assert any("other categories than coco_2017_val" in line for line in lines)
    assert any("NOTE" in line and "COCO itself has 5000 and 36781" in line for line in lines)


# --- Cityscapes ----------------------------------------------------------------------------------

SIZE = (64, 32)
INSTANCE = ["MODEL.ROI_HEADS.NUM_CLASSES", "8"]
SEMANTIC = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "19"]


def _make_city(root: Path, split: str, count: int) -> None:
    """Road below, sky above, one car."""
    images, labels = (root / part / split / "town" for part in ("leftImg8bit", "gtFine"))
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    objects = [
        {"label": "sky", "polygon": [[0, 0], [63, 0], [63, 15], [0, 15]]},
        {"label": "road", "polygon": [[0, 16], [63, 16], [63, 31], [0, 31]]},
        {"label": "car", "polygon": [[10, 18], [30, 18], [30, 28], [10, 28]]},
        {"label": "cargroup", "polygon": [[40, 18], [50, 18], [50, 28], [40, 28]]},
    ]
    content = {"imgWidth": SIZE[0], "imgHeight": SIZE[1], "objects": objects}
    ids, train_ids, instances = (np.zeros(SIZE[::-1], np.uint16) for _ in range(3))
    for values, sky, road, car, group in (
        (ids, 23, 7, 26, 26),
        (train_ids, 10, 0, 13, 255),
        (instances, 23, 7, 26000, 26),
    ):
        values[:16], values[16:], values[18:29, 10:31], values[18:29, 40:51] = sky, road, car, group
    rng = np.random.default_rng(0)
    for number in range(count):
        stem = f"town_000000_{number:06d}"
        pixels = rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{stem}_leftImg8bit.png")
        (labels / f"{stem}_gtFine_polygons.json").write_text(json.dumps(content))
        Image.fromarray(ids.astype(np.uint8)).save(labels / f"{stem}_gtFine_labelIds.png")
        Image.fromarray(train_ids.astype(np.uint8)).save(
            labels / f"{stem}_gtFine_labelTrainIds.png"
        )
        Image.fromarray(instances).save(labels / f"{stem}_gtFine_instanceIds.png")


@pytest.fixture
def city(tmp_path, monkeypatch) -> Path:
    """Cityscapes where this process, with Detectron2 imported, looks for it."""
    root = tmp_path / "cityscapes"
    for split, count in (("train", 3), ("val", 1)):
        _make_city(root, split, count)
        for task in ("instance_seg", "sem_seg"):
            facts = vars(MetadataCatalog.get(f"cityscapes_fine_{task}_{split}"))
            monkeypatch.setitem(facts, "image_dir", str(root / "leftImg8bit" / split))
            monkeypatch.setitem(facts, "gt_dir", str(root / "gtFine" / split))
    return root


def _city_options(task: str) -> list[str]:
    names = [f"cityscapes_fine_{task}_{split}" for split in ("train", "val")]
    more = INSTANCE if task == "instance_seg" else SEMANTIC
    return ["DATASETS.TRAIN", f"('{names[0]}',)", "DATASETS.TEST", f"('{names[1]}',)", *more]


def _labels(root: Path, end: str) -> Path:
    return root / "gtFine" / "train" / "town" / f"town_000000_000001_gtFine_{end}"


def _photo(root: Path) -> Path:
    return root / "leftImg8bit" / "train" / "town" / "town_000000_000001_leftImg8bit.png"


@pytest.mark.parametrize("task", ["instance_seg", "sem_seg"])
def test_other_road_scenes_pass(city, capsys, task):
    status, lines = _doctor(capsys, *_city_options(task))
    assert status == 0, lines
    assert any("NOTE   3 images, Cityscapes itself has 2975" in line for line in lines)
    assert any("another size than Cityscapes' 2048x1024: 3 [town" in line for line in lines)
    objects = task == "instance_seg"
    assert lines[-1] == f"0 errors, {6 if objects else 4} notes: training can start"
    assert any("classes without objects: 7 [bicycle; bus; " in line for line in lines) == objects


def test_labels_without_images_are_noted(city, capsys):
    _photo(city).unlink()
    status, lines = _doctor(capsys, *_city_options("instance_seg"))
    assert status == 0
    assert any("NOTE" in line and "label files without an image: 3" in line for line in lines)


def _edit(**changes: object) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = _labels(root, "polygons.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _objects(label: str, polygon: object) -> Callable[[Path], None]:
    return _edit(objects=[{"label": label, "polygon": polygon}])


def _paint(end: str, value: int, size: tuple[int, int] = SIZE) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        kind = np.uint16 if end.startswith("instance") else np.uint8
        Image.fromarray(np.full(size[::-1], value, kind)).save(_labels(root, end))

    return change


def _cut(end: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = _labels(root, end)
        file.write_bytes(file.read_bytes()[:60])

    return change


TRIANGLE = [[1, 1], [9, 1], [9, 9]]
PREPARE = "run python tools/prepare_cityscapes.py"
REMAKE = f"remove them, then {PREPARE}"


def _palette(root: Path) -> None:
    """The same numbers, which would be read as the lightness of their colours."""
    file = _labels(root, "labelTrainIds.png")
    image = Image.fromarray(np.asarray(Image.open(file)))
    image.putpalette([7 * value % 256 for value in range(768)])
    image.save(file)


def _link_to_nowhere(root: Path) -> None:
    file = _labels(root, "labelTrainIds.png")
    file.unlink()
    file.symlink_to("nowhere.png")


def _no_objects(root: Path) -> None:
    for file in root.glob("gtFine/train/*/*_polygons.json"):
        content = json.loads(file.read_text())
        content["objects"] = [x for x in content["objects"] if x["label"] != "car"]
        file.write_text(json.dumps(content))


CITY = {
    "no train ids": (
        "sem_seg",
        lambda root: _labels(root, "labelTrainIds.png").unlink(),
        f"images without labelTrainIds.png: {PREPARE}: 1 [town_000000_000001",
    ),
    "no instance ids": (
        "instance_seg",
        lambda root: _labels(root, "instanceIds.png").unlink(),
        f"images without instanceIds.png: {PREPARE}: 1",
    ),
    "no instance ids, of segmenters": (
        "sem_seg",
        lambda root: _labels(root, "instanceIds.png").unlink(),
        f"images without instanceIds.png: {PREPARE}: 1",
    ),
    "link to nowhere": (
        "sem_seg",
        _link_to_nowhere,
        f"images without labelTrainIds.png: {PREPARE}: 1",
    ),
    "no objects": ("instance_seg", _no_objects, "it has no object to train on"),
    "no polygons": (
        "instance_seg",
        lambda root: _labels(root, "polygons.json").unlink(),
        "images without polygons.json: copy gtFine again: 1",
    ),
    "no images": (
        "instance_seg",
        lambda root: shutil.rmtree(_photo(root).parent),
        "there are no images CITY/NAME_leftImg8bit.png",
    ),
    "no folder": (
        "sem_seg",
        lambda root: shutil.rmtree(root / "gtFine" / "train"),
        "the label folder",
    ),
    "image is a link to nowhere": (
        "instance_seg",
        lambda root: (_photo(root).unlink(), _photo(root).symlink_to("nowhere.png")),
        "images that are missing, or links to nowhere: 1",
    ),
    "stray file": (
        "instance_seg",
        lambda root: (_photo(root).parent / "Thumbs.db").write_text(""),
        "files that are no images",
    ),
    "stray file among cities": (
        "instance_seg",
        lambda root: (root / "leftImg8bit" / "train" / "README").write_text(""),
        "files that are no images",
    ),
    "cut polygons": ("instance_seg", _cut("polygons.json"), "polygon files that cannot be read"),
    "no sizes": ("sem_seg", _edit(imgWidth=None), "polygon files without imgWidth"),
    "unknown class": ("instance_seg", _objects("cow", TRIANGLE), "that Cityscapes has not: 1"),
    "two points": ("instance_seg", _objects("car", TRIANGLE[:2]), "no lists of 3 or more [x, y]"),
    "NaN": ("instance_seg", _objects("car", [*TRIANGLE, [1, float("nan")]]), "no lists of 3"),
    "text": ("instance_seg", _objects("car", [*TRIANGLE, [1, "x"]]), "no lists of 3 or more"),
    "far": ("instance_seg", _objects("car", [*TRIANGLE, [999, 1]]), "reach far outside"),
    "cut image": (
        "sem_seg",
        lambda root: _photo(root).write_bytes(_photo(root).read_bytes()[:300]),
        "images that cannot be read",
    ),
    "image of another size": (
        "instance_seg",
        lambda root: Image.new("RGB", (60, 32)).save(_photo(root)),
        "images of another size than their polygons say: 1 [town_000000_000001",
    ),
    "cut labels": ("sem_seg", _cut("labelTrainIds.png"), f"files that cannot be read: {REMAKE}"),
    "labels with a palette": ("sem_seg", _palette, f"8 bits (a palette?): {REMAKE}: 1"),
    "labels in colour": (
        "sem_seg",
        lambda root: Image.new("RGB", SIZE).save(_labels(root, "labelTrainIds.png")),
        "labelTrainIds.png files in colour",
    ),
    "ids instead of train ids": (
        "sem_seg",
        _paint("labelTrainIds.png", 26),
        f"values that they must not have: {REMAKE}: 1",
    ),
    "wrong ids": ("sem_seg", _paint("labelIds.png", 34), "labelIds.png files with values"),
    "instance of no object": (
        "instance_seg",
        _paint("instanceIds.png", 7001),
        "instanceIds.png files with values that they must not have",
    ),
    "labels of another size": (
        "sem_seg",
        _paint("labelTrainIds.png", 3, (32, 32)),
        "labelTrainIds.png files of another size than their image: 1",
    ),
    "instances of another size": (
        "instance_seg",
        _paint("instanceIds.png", 7, (32, 32)),
        "instanceIds.png files of another size",
    ),
}


@pytest.mark.parametrize("damage", CITY)
def test_damaged_cityscapes(city, capsys, damage):
    task, change, said = CITY[damage]
    change(city)
    status, lines = _doctor(capsys, *_city_options(task))
    assert status == 1
    assert any(line.startswith("  ERROR") and said in line for line in lines), lines
    assert not any(
        "ERROR" in line for line in lines[lines.index(f"data set cityscapes_fine_{task}_val") :]
    )


def test_what_the_doctor_says_about_labels_helps(city, capsys):
    damages = {"labelTrainIds.png": _palette, "labelIds.png": _cut("labelIds.png")}
    for end, change in damages.items():
        change(city)
        assert _doctor(capsys, *_city_options("sem_seg"))[0] == 1
        prepare_cityscapes(city, workers=1)
        assert _doctor(capsys, *_city_options("sem_seg"))[0] == 1
        _labels(city, end).unlink()
        prepare_cityscapes(city, workers=1)
        assert _doctor(capsys, *_city_options("sem_seg"))[0] == 0


def test_other_objects_to_train_on_are_counted_anew(city, capsys):
    """What passes as a set to evaluate on need not as one to train on."""
    _no_objects(city)
    names = [f"('cityscapes_fine_instance_seg_{split}',)" for split in ("val", "train")]
    options = ["DATASETS.TRAIN", names[0], "DATASETS.TEST", names[1], *INSTANCE]
    status, lines = _doctor(capsys, *options)
    assert status == 0
    assert any("NOTE" in line and "3 of 3 images have no objects" in line for line in lines)
    assert _doctor(capsys, *_city_options("instance_seg"))[0] == 1


def test_city_without_folders_is_told_where_its_layout_stands(city, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(city.parent))
    shutil.rmtree(city / "gtFine")
    _, lines = _doctor(capsys, *_city_options("sem_seg"))
    assert any("docs/cityscapes.md shows what belongs there" in line for line in lines)


def test_city_of_another_kind(city, capsys):
    status, lines = _doctor(
        capsys, *_city_options("sem_seg"), "MODEL.META_ARCHITECTURE", "RetinaNet"
    )
    assert status == 1
    assert any("it has label maps, but a RetinaNet needs objects" in line for line in lines)
