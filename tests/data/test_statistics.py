"""Tests the doctor's statistics of data sets, and its near-duplicate images."""

import io
import math

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image, ImageEnhance

from contnet.data.validation.duplicates import find_near_duplicates, fingerprint, fingerprints
from contnet.data.validation.statistics import count_in_bins, read_statistics


def thing(category, box, mode=BoxMode.XYWH_ABS, crowd=0):
    return {"category_id": category, "bbox": box, "bbox_mode": mode, "iscrowd": crowd}


def test_objects_are_counted():
    records = [
        {
            "width": 20,
            "height": 10,
            "annotations": [thing(1, [0, 0, 4, 9]), thing(1, [1, 1, 2, 2])],
        },
        {"width": 10, "height": 10, "annotations": []},
        {
            "width": 10,
            "height": 20,
            "annotations": [
                thing(0, [1, 1, 4, 2], BoxMode.XYXY_ABS),
                thing(0, [0, 0, 9, 9], crowd=1),
                thing(1, [3, 3, 5, 0]),
            ],
        },
    ]
    found = read_statistics(records, ["cat", "dog", "unicorn"])
    assert (found.images, found.empty, found.objects) == (3, 1, [2, 0, 2])
    assert found.classes == {"cat": 1, "dog": 3, "unicorn": 0} and found.counted == "objects"
    assert found.sizes == pytest.approx([6, 2, math.sqrt(3), 0])
    assert found.ratios == pytest.approx([4 / 9, 1, 3, math.inf])
    assert found.image_ratios == [2, 1, 0.5]


def test_labels_and_pixels_are_counted(tmp_path):
    found = read_statistics([{"label": 0}, {"label": 2}, {"label": 2}], ["a", "b", "c"])
    assert found.classes == {"a": 1, "b": 0, "c": 2} and found.empty is None
    labels = np.array([[0, 0, 1], [255, 1, 1]], dtype=np.uint8)
    for name, array in (("x", labels), ("y", labels[:, :2])):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    records = [{"sem_seg_file_name": str(tmp_path / f"{name}.png")} for name in "xy"]
    found = read_statistics(records, ["road", "sky"])
    assert found.classes == {"road": 4, "sky": 4} and found.counted == "pixels"


def test_bins_hold_what_is_from_their_edge_on():
    assert count_in_bins([0, 1, 1.9, 2, 7, math.inf], [1, 2, 5]) == [1, 2, 1, 2]
    assert count_in_bins([], [1, 2]) == [0, 0, 0]


def picture(seed: int) -> Image.Image:
    """Makes a smooth image."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((210, 180), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40)
    return Image.open(stream)


COPIES = {
    "itself": lambda image: image,
    "smaller": lambda image: image.resize((97, 83)),
    "recompressed": recompressed,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_alike(copy):
    images = [picture(0), COPIES[copy](picture(0)), picture(1), picture(2)]
    prints = [fingerprint({"file_name": "x", "pixels": image}, 0) for image in images]
    assert find_near_duplicates(prints) == [[0, 1]]


def test_others_are_not():
    prints = [fingerprint({"file_name": "x", "pixels": picture(seed)}, 0) for seed in range(300)]
    assert find_near_duplicates(prints) == []


def test_every_pair_within_two_bits_is_found():
    """Compares with all pairs, for fingerprints that are close to each other."""
    random = np.random.default_rng(0)
    base = [int(each) for each in random.integers(0, 2**63, 12)]
    prints = []
    for each in base:
        for flips in (0, 1, 2, 3, 5):
            bits = random.choice(63, flips, replace=False)
            prints.append(each ^ sum(1 << int(bit) for bit in bits))
    groups = {
        index: number
        for number, group in enumerate(find_near_duplicates(prints))
        for index in group
    }
    for one in range(len(prints)):
        for other in range(one):
            if (prints[one] ^ prints[other]).bit_count() <= 2:
                assert groups[one] == groups[other]
    assert {len(group) for group in find_near_duplicates(prints)} <= {3, 4, 5}


def test_damaged_and_plain_images_are_like_none(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file in files[:2]:
        Image.new("RGB", (50, 40), (9, 9, 9)).save(file)
    for file in files[2:]:
        file.write_bytes(b"\x89PNG")
    prints = fingerprints([{"file_name": str(file)} for file in files], 0, "mine", 2)
    assert prints == [None] * 4 and find_near_duplicates(prints) == []
