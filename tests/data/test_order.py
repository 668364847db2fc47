"""Tests the order of training images: whole epochs, aspect groups, same for any process count."""

import itertools
import logging
import pickle
import time
from collections import Counter

import numpy as np
import pytest
from detectron2.config import get_cfg

from contnet.config import add_contnet_config
from contnet.data.pipeline.loader import TrainingBatchSampler, build_order, build_train_loader
from contnet.data.pipeline.order import ImageOrder
from contnet.utils.errors import UserError


def some_of(number: int, landscape: int) -> np.ndarray:
    """Returns which images are landscape, spread over the data set."""
    chosen = np.zeros(number, bool)
    chosen[np.random.default_rng(0).permutation(number)[:landscape]] = True
    return chosen


def first_of(order: ImageOrder, count: int, start: int = 0) -> list[int]:
    return list(itertools.islice(order.images_from(start), count))


# Images, landscape images (None: no groups), images per group, and repeats.
ORDERS = {
    "COCO's": (100, 70, 2, False),
    "odd numbers": (11, 4, 3, False),
    "one of the other aspect": (9, 1, 4, False),
    "fewer than a group": (3, 1, 16, False),
    "one aspect": (7, 7, 2, False),
    "one image": (1, 0, 2, False),
    "no groups": (7, None, 2, False),
    "repeated": (20, 6, 2, True),
    "repeated, few": (3, 1, 8, True),
    "repeated, no groups": (10, None, 1, True),
}


def order_of(name: str, seed: int = 5) -> ImageOrder:
    images, landscape, size, repeated = ORDERS[name]
    repeats = np.linspace(1, 3.7, images) if repeated else None
    wide = None if landscape is None else some_of(images, landscape)
    return ImageOrder(images, seed, size, wide, repeats)


@pytest.mark.parametrize("name", ORDERS)
def test_any_place_is_computed_as_it_is_reached(name):
    order = order_of(name)
    expected = first_of(order, 700)
    for start in [*range(60), 99, 100, 101, 333, 500, 640]:
        assert first_of(order, 60, start) == expected[start : start + 60]
    assert first_of(order_of(name, seed=6), 700) != expected or order.images == 1


@pytest.mark.parametrize("name", [name for name in ORDERS if "repeated" not in name])
def test_each_image_comes_once_in_an_epoch(name):
    images, landscape, _, _ = ORDERS[name]
    order = order_of(name)
    size = order.group_size
    epochs = 3 * size  # after this, no group is incomplete
    found = first_of(order, epochs * images)
    assert set(Counter(found).values()) == {epochs}
    wide = some_of(images, landscape or 0)
    for kind in np.unique(wide):  # for an aspect, no image is ever far ahead of another
        part = [image for image in found if wide[image] == kind]
        number = len(set(part))
        for n in range(1, epochs):
            counts = np.bincount(part[: n * number], minlength=images)[wide == kind]
            assert counts.max() - counts.min() <= 2


def test_epochs_without_groups_are_permutations():
    found = np.reshape(first_of(order_of("no groups"), 70), (10, 7))
    assert (np.sort(found) == range(7)).all()
    assert len({tuple(epoch) for epoch in found}) > 5


@pytest.mark.parametrize("name", [name for name in ORDERS if "no groups" not in name])
def test_groups_have_one_aspect(name):
    images, landscape, size, _ = ORDERS[name]
    wide = some_of(images, landscape)
    groups = wide[np.reshape(first_of(order_of(name), 100 * size), (100, size))]
    assert (groups == groups[:, :1]).all()
    if 0 < landscape < images:  # neither aspect is delayed or preferred
        assert groups[:, 0].mean() == pytest.approx(landscape / images, abs=0.25)


def test_images_are_repeated_as_their_factors_say():
    repeats = np.array([1, 1.25, 2.5, 3.8])
    order = ImageOrder(4, 3, repeats=repeats)
    assert order.images_per_epoch == pytest.approx(8.55)
    epochs = 400
    found = np.bincount(first_of(order, round(epochs * repeats.sum())))
    assert found == pytest.approx(epochs * repeats, abs=6)
    ones = ImageOrder(4, 3, repeats=np.ones(4))
    assert first_of(ones, 50) == first_of(ImageOrder(4, 3), 50)


@pytest.mark.parametrize(
    ("images", "landscape", "repeated", "batch"),
    [
        (118_287, 88_000, False, 16),
        (1_281_167, None, False, 1024),
        (100_170, 75_000, True, 16),
        (4, 3, False, 16),
        (1, 1, False, 16),
        (4, 3, True, 16),
    ],
)
def test_iteration_90000_is_reached_in_a_second(images, landscape, repeated, batch):
    repeats = np.linspace(1, 30, images) ** 0.5 if repeated else None
    wide = None if landscape is None else some_of(images, landscape)
    sampler = TrainingBatchSampler(ImageOrder(images, 1, 2, wide, repeats), batch)
    sampler.start = 90_000 * batch
    start = time.process_time()
    found = next(iter(sampler))
    assert time.process_time() - start < 1
    assert [position for _, position, _ in found] == list(range(90_000 * batch, 90_001 * batch))


# --- steps ---------------------------------------------------------------------------------------


def steps_of(order, batch, passes, world_size, steps=12, start=0):
    """Returns the images of each step, over all processes, and the batches of each process."""
    iterators = []
    for rank in range(world_size):
        sampler = TrainingBatchSampler(order, batch, passes, rank, world_size)
        sampler.start = start
        iterators.append(iter(sampler))
    found = []
    for _ in range(steps):
        cells = [[next(each) for _ in range(passes)] for each in iterators]
        sizes = {len(cell) for row in cells for cell in row}
        assert sizes == {batch // passes // world_size}
        found.append([cells[rank][i] for i in range(passes) for rank in range(world_size)])
    return found


@pytest.mark.parametrize("name", ["COCO's", "odd numbers", "no groups", "repeated, few"])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("passes", [1, 2])
def test_steps_are_the_same_for_any_number_of_processes(name, world_size, passes):
    order = order_of(name)
    expected = steps_of(order, 16, 1, 1)
    found = steps_of(order, 16, passes, world_size)
    for (whole,), cells in zip(expected, found, strict=True):
        assert list(itertools.chain(*cells)) == whole
    # From the middle on, with other settings.
    rest = steps_of(order, 16, passes, world_size, steps=5, start=7 * 16)
    assert [list(itertools.chain(*cells)) for cells in rest] == [w for (w,) in expected[7:]]


@pytest.mark.parametrize(("batch", "world_size"), [(1, 1), (3, 1), (3, 3), (6, 2)])
def test_batches_that_split_groups(batch, world_size):
    order = order_of("COCO's")
    found = steps_of(order, batch, 1, world_size, steps=20)
    items = [item for step in found for cell in step for item in cell]
    assert items == [(5, i, image) for i, image in enumerate(first_of(order, 20 * batch))]


def test_a_batch_of_one_group_has_one_aspect():
    wide = some_of(100, 70)
    for step in steps_of(order_of("COCO's"), 16, 1, 8, steps=30):
        assert all(len({wide[image] for _, _, image in cell}) == 1 for cell in step)


# --- state ---------------------------------------------------------------------------------------


def warnings_of(caplog) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_resume_with_other_processes_has_the_same_images(caplog):
    first = TrainingBatchSampler(order_of("COCO's", seed=9), 16, 2, 1, 2)
    state = pickle.loads(pickle.dumps(first.state_dict(7)))
    later = TrainingBatchSampler(order_of("COCO's"), 16)
    later.load_state_dict(state)
    assert later.images_seen(0) == first.images_seen(7) == 112
    (expected,) = steps_of(first.order, 16, 1, 1, start=112)[0]
    assert next(iter(later)) == expected
    later.load_state_dict(later.state_dict(3))
    assert later.state_dict(0) == {**state, "images_seen": 160}
    assert warnings_of(caplog) == []


def test_a_resume_with_another_batch_goes_on_after_the_images_seen(caplog):
    later = TrainingBatchSampler(order_of("COCO's"), 4)
    later.load_state_dict(TrainingBatchSampler(order_of("COCO's"), 16).state_dict(3))
    assert [position for _, position, _ in next(iter(later))] == [48, 49, 50, 51]
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (ImageOrder(100, 5, 4, some_of(100, 70)), "group_size 2 -> 4"),
        (ImageOrder(100, 5, 2), "group_size 2 -> 1"),
        (ImageOrder(99, 5, 2, some_of(99, 70)), "images 100 -> 99"),
        (ImageOrder(100, 5, 2, some_of(100, 70), np.full(100, 1.5)), "images_per_epoch 100 -> 150"),
    ],
)
def test_another_order_is_told_once(caplog, changed, told):
    sampler = TrainingBatchSampler(changed, 16)
    sampler.load_state_dict(TrainingBatchSampler(order_of("COCO's"), 16).state_dict(10))
    (warning,) = warnings_of(caplog)
    assert "Resuming after 160 images" in warning and told in warning
    assert len(next(iter(sampler))) == 16


def test_the_state_of_former_versions(caplog):
    state = {"seed": 9, "images": 90, "batch_size": 2, "world_size": 8, "start": 6, "batches": 10}
    sampler = TrainingBatchSampler(order_of("COCO's"), 16)
    sampler.load_state_dict(state)
    assert (sampler.seed, sampler.images_seen(0)) == (9, 166)
    (warning,) = warnings_of(caplog)
    assert "Resuming after 166 images" in warning
    sampler.load_state_dict(sampler.state_dict(1))  # a state of this version
    assert len(warnings_of(caplog)) == 1 and sampler.images_seen(0) == 182


# --- from a config -------------------------------------------------------------------------------


def dicts_of(number: int) -> list[dict]:
    return [
        {
            "width": 4 if i % 3 else 3,
            "height": 3 if i % 3 else 4,
            "annotations": [{"category_id": 0 if i else 1}],
        }
        for i in range(number)
    ]


def config(*options):
    cfg = get_cfg()
    add_contnet_config(cfg)
    cfg.merge_from_list([*options, "MODEL.DEVICE", "cpu"])
    return cfg


def test_factors_are_those_of_detectron2():
    sampler = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    order = build_order(config(*sampler, "DATALOADER.REPEAT_THRESHOLD", 0.4), dicts_of(10), 3)
    assert order.images_per_epoch == 9 + 2  # the factor of the rare class is sqrt(0.4 / 0.1)
    found = Counter(first_of(order, 10 * 22))
    assert found[0] == pytest.approx(2 * found[1], abs=3)


@pytest.mark.parametrize("key", ["width", "annotations"])
def test_records_without_what_the_order_needs_are_one_line(key):
    """Such records come from a user's loader, or have image labels."""
    dicts = [{name: each[name] for name in each if name != key} for each in dicts_of(3)]
    with pytest.raises(UserError, match=rf"have no {key}.*ASPECT_RATIO_GROUPING False"):
        build_order(config("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"), dicts, 3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["SOLVER.IMS_PER_BATCH", 2], []),
        (["SOLVER.IMS_PER_BATCH", 1], ["1 image in a pass: groups of images of one orientation"]),
        (["SOLVER.IMS_PER_BATCH", 3], ["3 images in a pass: groups of images of one orientation"]),
        (["SOLVER.IMS_PER_BATCH", 8], ["8 images in a pass: a batch may have landscape and"]),
        (["SOLVER.IMS_PER_BATCH", 8, "SOLVER.GRAD_ACCUM_STEPS", 4], []),
        (["SOLVER.IMS_PER_BATCH", 3, "DATALOADER.GROUP_SIZE", 3], []),
        (["SOLVER.IMS_PER_BATCH", 3, "DATALOADER.ASPECT_RATIO_GROUPING", False], []),
    ],
)
def test_groups_that_are_no_batch_are_told(caplog, options, told):
    with caplog.at_level(logging.INFO, "contnet"):
        loader = build_train_loader(config(*options), dicts_of(10), seed=3)
    lines = [each.getMessage() for each in caplog.records if "GROUP_SIZE" in each.getMessage()]
    assert len(lines) == len(told) and all(map(str.__contains__, lines, told))
    images, passes = loader.batch_sampler.step_size, options[-1] if "ACCUM" in options[-2] else 1
    assert len(next(iter(loader.batch_sampler))) == images // passes
