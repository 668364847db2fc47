"""Measures training steps: ResNet-50 and ConTNet, pooled regions, DDP, and checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks import checkpoint
from benchmarks.gpu.network import make_network, profile_step, record_profile
from benchmarks.gpu.part import Part, measure
from benchmarks.gpu.training import PRECISIONS, process_group
from benchmarks.step import build_step
from contnet.launch.preflight_config import load_checked_config
from contnet.modeling.amp import keep_regions_exact
from contnet.modeling.build import use_channels_last

__all__ = ["measure_checkpoint", "measure_ddp", "measure_steps", "profile_steps"]

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_FEW_REGIONS = """
MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TRAIN 20
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16
"""


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = allowed
    try:
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was


def _config(part: Part, backbone: str, *opts: str) -> CfgNode:
    # A small learning rate, so that random weights stay finite and the losses cost as usual.
    own = ["MODEL.DEVICE", part.device, "SOLVER.BASE_LR", "1e-6", *opts]
    if not part.on_gpu:
        own += _FEW_REGIONS.split()
    return load_checked_config(str(_CONFIGS / f"faster_rcnn_{backbone}.yaml"), own)


def _detectors(part: Part) -> tuple[tuple[str, str], tuple[int, int], int]:
    """Returns two backbones, the size of the images and their number."""
    return (("r50", "contm"), (800, 1333), 2) if part.on_gpu else (("r50", "contti"), (64, 96), 1)


def profile_steps(part: Part) -> None:
    """Profiles steps of the network and of the detector in bfloat16."""
    profile_step(part)
    (_, backbone), size, images = _detectors(part)
    what = f"Faster R-CNN, {backbone}, {size[0]}x{size[1]}, batch {images}"
    with part.fence("profiled steps", step=what):
        cfg = _config(part, backbone, *PRECISIONS["bf16"])
        record_profile(part, what, build_step(cfg, images, size)[2])


def measure_steps(part: Part) -> None:
    """Measures Faster R-CNN with ConT-M and ResNet-50 as shipped, and pooled regions."""
    backbones, size, images = _detectors(part)
    row = {"size": f"{size[0]}x{size[1]}, batch {images}"}
    for precision, opts in {"bf16": PRECISIONS["bf16"], "fp32": (), "tf32": ()}.items():
        with part.fence("steps", precision=precision, **row), _tf32(precision == "tf32"):
            torch.manual_seed(0)
            ways = {
                name: build_step(_config(part, name, *opts), images, size)[2] for name in backbones
            }
            baselines = dict.fromkeys(ways, backbones[0])
            measure(part, "steps", ways, baselines, precision=precision, **row)
    for dtype in (torch.bfloat16, torch.float16):
        with part.fence("regions", precision=str(dtype).removeprefix("torch.")):
            _compare_regions(part, dtype)


def _compare_regions(part: Part, dtype: torch.dtype) -> None:
    """Measures errors of pooled features in half precision, with and without exact coordinates."""
    height, width = (800, 1333) if part.on_gpu else (200, 333)
    generator = torch.Generator().manual_seed(0)
    # Features that change within a few pixels, as in a network.
    coarse = torch.randn(1, 256 if part.on_gpu else 4, height // 8, width // 8, generator=generator)
    features = F.interpolate(coarse, scale_factor=2, mode="bilinear").to(part.device, dtype)
    corners = torch.rand(256, 2, generator=generator) * torch.tensor([width - 64, height - 64])
    extents = 8 + 56 * torch.rand(256, 2, generator=generator)
    boxes = [Boxes(torch.cat([corners, corners + extents], 1).to(part.device))]
    before = nn.ModuleList([ROIPooler(7, [1 / 4], 0, "ROIAlignV2")])
    after = nn.ModuleList([ROIPooler(7, [1 / 4], 0, "ROIAlignV2")])
    keep_regions_exact(after)
    exact = before[0]([features.float()], boxes)
    name = str(dtype).removeprefix("torch.")

    def error(pooled: Tensor) -> float:
        return ((pooled.float() - exact).norm() / exact.norm()).item()

    for way, pooler in {"before": before[0], "after": after[0]}.items():
        if way == "before" and dtype == torch.bfloat16 and not part.on_gpu:
            why = "torchvision has no such kernel for a CPU"
            part.record("regions", way=way, precision=name, left_out=why)
            continue
        with part.fence("regions", way=way, precision=name):
            difference = error(pooler([features], boxes))
            call = partial(pooler, [features], boxes)
            measure(part, "regions", {way: call}, precision=name, difference=difference)


def measure_ddp(part: Part) -> None:
    """Measures a step of the classifier, with and without DDP, in one process."""
    images = torch.randn(*((32, 3, 224, 224) if part.on_gpu else (2, 3, 64, 64)))
    images = images.to(part.device)

    def step(model: nn.Module) -> None:
        with torch.autocast(part.device, torch.bfloat16):
            out = model(images)
        out.float().square().mean().backward()

    with (
        part.fence("ddp"),
        process_group(part) as backend,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        devices = [torch.cuda.current_device()] if part.on_gpu else None
        alone, model = make_network(part).train(), make_network(part).train()
        for each in (alone, model):
            use_channels_last(each)  # as build_model does on a GPU
        model = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
        ways = {"alone": partial(step, alone), "ddp": partial(step, model)}
        measure(part, "ddp", ways, dict.fromkeys(ways, "alone"), backend=backend)
        part.record(
            "ddp warnings",
            strides=sum("do not match bucket view strides" in str(each.message) for each in said),
            warnings=sorted({str(each.message)[:200] for each in said}),
        )


def measure_checkpoint(part: Part) -> None:
    """Measures the time that training loses to background and synchronous checkpoints."""
    args = argparse.Namespace(
        config_file=str(_CONFIGS / f"faster_rcnn_{'contm' if part.on_gpu else 'contti'}.yaml"),
        device=part.device,
        rounds=3 if part.on_gpu else 1,
        steps=None if part.on_gpu else 1,
        size=(64, 64),
    )
    with part.fence("checkpoint"), tempfile.TemporaryDirectory(dir=part.output) as folder:
        part.record("checkpoint", **checkpoint.measure(args, folder))
