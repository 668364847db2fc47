"""Tests tools/doctor.py --page: the training images, and statistics of the data sets."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from conftest import SMALL
from leaves import CONFIGS
from PIL import Image

from contnet.commands.doctor import main
from contnet.config import load_config
from contnet.data.datasets.classes import dataset_class_names
from contnet.data.datasets.register import register_datasets
from contnet.data.pipeline.annotations import load_dataset_dicts
from contnet.data.pipeline.loader import build_train_loader
from contnet.evaluation.drawing import draw_prediction

PICTURE = re.compile(r'src="data:image/jpeg;base64,([^"]*)" alt="input 1, (\d+)x(\d+) of ([^"]*)"')
DATA = {
    "mask_rcnn_contti": SMALL,
    "cityscapes/pspnet_contti": ["INPUT.CROP.SIZE", "[64,64]", "SOLVER.IMS_PER_BATCH", "2"],
    "imagenet/contti_strong": [
        *("MODEL.CLASSIFIER.NUM_CLASSES", "7", "SOLVER.IMS_PER_BATCH", "4"),
        *("MODEL.CLASSIFIER.MIXUP_ALPHA", "0.0", "MODEL.CLASSIFIER.CUTMIX_ALPHA", "0.0"),
        *("INPUT.CLASSIFIER.RANDOM_ERASING", "0.0"),
    ],
}


@pytest.fixture(autouse=True)
def data_here(coco_here, cityscapes_root, imagenet_here):
    """Provides tiny versions of all data sets."""


def arguments(name, *more):
    words = [*DATA[name], "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", *more]
    return ["--config-file", str(CONFIGS / f"{name}.yaml"), "--workers", "1", *words]


@pytest.mark.parametrize("name", DATA)
def test_it_shows_what_the_loader_gives(name, tmp_path):
    page = tmp_path / "new" / "data.html"
    assert main(["--page", str(page), *arguments(name, "SEED", "5")]) == 0
    pictures = PICTURE.findall(page.read_text())
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), [*DATA[name], "DATALOADER.NUM_WORKERS", "0"])
    register_datasets(cfg)
    dicts = load_dataset_dicts(cfg, cfg.DATASETS.TRAIN, train=True)
    assert len(pictures) == min(8, len(dicts))
    classes = dataset_class_names(cfg, cfg.DATASETS.TRAIN)
    batch = next(iter(build_train_loader(cfg, dicts, 5)))
    for inputs, (data, width, height, file) in zip(batch, pictures, strict=False):
        assert inputs["file_name"].endswith(file)
        image = inputs["image"]
        assert image.shape[1:] == (int(height), int(width))
        shown = Image.open(io.BytesIO(base64.b64decode(data)))
        fed = image.numpy().transpose(1, 2, 0)
        fed = np.ascontiguousarray(fed if cfg.INPUT.FORMAT == "RGB" else fed[..., ::-1])
        if "sem_seg" in inputs:  # label maps cover nearly the whole image
            fed = draw_prediction(fed, {"semantic": inputs["sem_seg"].numpy()}, classes)
        fed = Image.fromarray(fed).resize(shown.size)
        # Drawn boxes change the image a little; other flips or crops change it a lot.
        alike = np.corrcoef(np.ravel(shown), np.ravel(fed))[0, 1]
        mirrored = np.corrcoef(np.ravel(shown), np.asarray(fed)[:, ::-1].ravel())[0, 1]
        assert alike > max(0.5, mirrored)


def test_it_counts(tmp_path, coco_here):
    page = tmp_path / "data.html"
    assert main(["--page", str(page), *arguments("mask_rcnn_contti")]) == 0
    text = page.read_text()
    assert len(page.read_bytes()) < 5e6
    content = json.loads(
        (coco_here / "datasets/coco/annotations/instances_train2017.json").read_text()
    )
    objects = [each for each in content["annotations"] if not each["iscrowd"]]
    names = {each["id"]: each["name"] for each in content["categories"]}
    section = text[text.index("Statistics of coco_2017_train") :]
    rows = dict(
        re.findall(
            r'<th scope="row">([^<]*)</th><td>(\d+)</td>', section[: section.index("</table>")]
        )
    )
    assert sum(map(int, rows.values())) == len(objects)
    for category in {each["category_id"] for each in objects}:
        number = sum(each["category_id"] == category for each in objects)
        assert int(rows[names[category]]) == number


def test_it_names_copies_of_a_training_image(tmp_path, coco_here):
    root = coco_here / "datasets" / "coco"
    kept = root.resolve()
    root.unlink()
    shutil.copytree(kept, root)
    one = sorted((root / "train2017").iterdir())[3]
    other = sorted((root / "val2017").iterdir())[1]
    size = Image.open(other).size
    Image.open(one).convert("RGB").resize(size).save(other, quality=70)
    page = tmp_path / "data.html"
    assert main(["--page", str(page), *arguments("mask_rcnn_contti")]) == 0
    text = page.read_text()
    ids = {int(one.stem), int(other.stem)}
    (row,) = [
        row
        for row in re.findall(r"<tr>.*?</tr>", text[text.index("Near-duplicate images") :])
        if all(f"{id_}" in row for id_ in ids)
    ]
    assert "coco_2017_train" in row and "coco_2017_val" in row


def test_a_set_with_errors_is_named(tmp_path, coco_here):
    (coco_here / "datasets" / "coco").unlink()
    page = tmp_path / "data.html"
    assert main(["--page", str(page), *arguments("mask_rcnn_contti")]) == 1
    text = page.read_text()
    assert "coco_2017_train has errors" in text and "ERROR" in text
