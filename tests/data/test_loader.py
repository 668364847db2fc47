"""Tests a classifier's batches: one tensor, and therefore one open file, for all images."""

import itertools
import os
import resource

import pytest
import torch
from detectron2.data.build import trivial_batch_collator
from detectron2.structures import Boxes, Instances
from image_folders import config, load

from contnet.data.pipeline.loader import build_train_loader, to_device, waiting_for_batch
from contnet.evaluation.evaluate import Evaluator
from contnet.evaluation.unreadable import CollateReadable
from contnet.modeling.build import build_model
from contnet.modeling.image_batch import ImageBatch, collate_images
from contnet.utils.failures import explain_failure
from contnet.utils.processes import raise_open_files

pytest_plugins = ["image_folders"]

SMALL = """
MODEL.DEVICE cpu INPUT.CLASSIFIER.SIZE 32 INPUT.CLASSIFIER.RESIZE_TEST 32
INPUT.CLASSIFIER.CROP_TEST 32 DATALOADER.TIMEOUT 60
"""


@pytest.fixture
def few_files():
    """Limits this process to 64 more open files than it has, fewer than there are images."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = (number for number in itertools.count() if number not in used)
    most = next(itertools.islice(free, 64, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def small(workers: int, batch: int = 256, *more: str):
    loading = ("DATALOADER.NUM_WORKERS", str(workers), "SOLVER.IMS_PER_BATCH", str(batch))
    return config(*SMALL.split(), *loading, *more)


def first_batches(workers: int, collate=None) -> list:
    cfg = small(workers)
    loader = build_train_loader(cfg, load(cfg, "imagenet_train"), seed=3)
    loader.collate_fn = collate or loader.collate_fn
    with waiting_for_batch(cfg):
        return list(itertools.islice(loader, 2))


def assert_equal(one, other) -> None:
    """Checks that two batches are bit for bit equal, regardless of their types."""
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        assert torch.equal(mine["image"], theirs["image"])
        assert all(mine[name] == theirs[name] for name in mine if name != "image")


def test_more_images_than_open_files(root, few_files):
    with_workers = first_batches(workers=2)
    for batch, expected in zip(with_workers, first_batches(workers=0), strict=True):
        assert len(batch) == 256 and batch.images.shape == (256, 3, 32, 32)
        storages = {image["image"].untyped_storage().data_ptr() for image in batch}
        assert storages == {batch.images.untyped_storage().data_ptr()}
        assert_equal(batch, expected)


def test_images_are_those_of_a_list(root):
    for batch, expected in zip(
        first_batches(0), first_batches(0, trivial_batch_collator), strict=True
    ):
        assert_equal(batch, expected)
        assert_equal(batch[:3], expected[:3])
        assert torch.equal(batch[-1]["image"], expected[-1]["image"])


def test_an_evaluation_with_more_images_than_open_files(root, few_files, monkeypatch, tmp_path):
    """One of the images is left out."""
    file = sorted(root.glob("imagenet/val/*/*.JPEG"))[1]
    file.write_bytes(file.read_bytes()[:200])
    options = ("TEST.SKIP_UNREADABLE", "True", "TEST.IMS_PER_PROCESS", "128")
    cfg = small(2, 4, *options, "OUTPUT_DIR", str(tmp_path / "run"))
    records = load(cfg, "imagenet_val")
    monkeypatch.setattr(
        "contnet.evaluation.evaluate.load_dataset_dicts", lambda *_, **__: records * 25
    )
    (tmp_path / "run").mkdir()
    seen = []
    model = build_model(cfg)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    Evaluator(cfg).evaluate(model)
    assert sum(map(len, seen)) == 25 * (len(records) - 1)
    assert all(isinstance(batch, ImageBatch) for batch in seen)
    assert not {image["file_name"] for batch in seen for image in batch} & {str(file)}


def inputs(number: int) -> list[dict]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(256, (number, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return [{"image": image, "label": i % 3} for i, image in enumerate(images)]


def test_a_classifier_takes_both_kinds_of_batches():
    cfg = small(0, 4)
    model = build_model(cfg)
    batch = inputs(4)
    assert torch.equal(*(model(each)["loss_cls"] for each in (batch, collate_images(batch))))
    with torch.no_grad():
        pairs = zip(*map(model.eval(), (batch, collate_images(batch))), strict=True)
    assert all(torch.equal(one["logits"], other["logits"]) for one, other in pairs)


def test_marked_images_are_apart():
    given = [{"unreadable": "a"}, *inputs(2), {"unreadable": "b"}]
    batch, marked = CollateReadable(collate_images)(given)
    assert_equal(batch, given[1:3])
    assert marked == [given[0], given[3]]
    assert CollateReadable(collate_images)(marked) == ([], marked)


def test_all_tensors_of_a_detector_go_to_the_device():
    """This excludes instances; the device that replaces a GPU here has no values."""
    boxes = Instances((32, 32), gt_boxes=Boxes(torch.zeros(1, 4)))
    given = {"file_name": "a", "sem_seg": torch.zeros(32, 32), "instances": boxes}
    batch = [each | given for each in inputs(2)]
    for moved, before in zip(to_device(batch, "meta"), batch, strict=True):
        assert moved["image"].is_meta and moved["sem_seg"].is_meta
        assert {**moved, **before}.keys() == before.keys()
        assert all(moved[name] is before[name] for name in ("file_name", "instances", "label"))
        assert not before["image"].is_meta
    assert_equal(to_device(inputs(2), "cpu"), inputs(2))


def test_a_stacked_batch_is_left_to_the_model():
    batch = collate_images(inputs(2))
    assert to_device(batch, "meta") is batch


def test_the_end_of_the_thread_that_pins_is_told():
    """PyTorch's error has no reason; the thread has printed it."""
    cfg = small(1, 4)
    with pytest.raises(RuntimeError) as caught, waiting_for_batch(cfg):
        raise RuntimeError("Pin memory thread exited unexpectedly")
    assert "open files" in explain_failure(caught.value)


def test_open_files_are_raised_to_the_hard_limit(few_files):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_open_files()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
