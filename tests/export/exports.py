"""Small models to export, and their examples run where this project cannot be imported."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import QUICK, SMALL
from leaves import CONFIGS, SYSTEMS, TINY
from torch import nn
from untrained import NAMES, OPTIONS

import contnet
from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.metadata import describe_model
from contnet.data.datasets.shapes_drawing import draw_picture

__all__ = ["draw_image", "run_example", "save_decided"]

# Larger than the coarsest stride, and not a multiple of a patch.
_SIZES = """
INPUT.MIN_SIZE_TEST 165 INPUT.MAX_SIZE_TEST 203 TEST.SLIDING_WINDOW.ENABLED False INPUT.FORMAT BGR
"""
_CLASSIFIER_SIZES = "INPUT.CLASSIFIER.RESIZE_TEST 80 INPUT.CLASSIFIER.CROP_TEST 61"
_SCORES = ("cls_score", "objectness_logits", "ctrness")
_DELTAS = ("bbox_pred", "anchor_deltas", "mask_head.predictor")

_BOOTSTRAP = """
import runpy, sys
hidden, sys.argv = set(sys.argv[1].split(",")), sys.argv[2:]
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"{name} is not installed here")
sys.meta_path.insert(0, Hidden())
for name in hidden:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} could be imported")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def draw_image(path: Path, height: int = 170, width: int = 230) -> Path:
    """Draws an image of shapes."""
    draw_picture(np.random.default_rng(3), 256, 256)[0].resize((width, height)).save(path)
    return path


def _spread(model: nn.Module, inputs: list[dict]) -> None:
    """Scales the last layers, so that scores differ by more than rounding and boxes change."""
    if hasattr(model, "roi_heads"):
        model.roi_heads.box_predictor.test_score_thresh = 0.0  # masks need detections
    for name, module in model.named_modules():
        wanted = 2.0 if name.endswith(_SCORES) else 0.5 if name.endswith(_DELTAS) else None
        if wanted is None:
            continue
        module.bias.data.zero_()  # larger than an untrained layer's outputs
        seen = []
        hook = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(inputs)
        hook.remove()
        values = torch.cat([each.flatten() for each in seen])
        module.weight.data *= wanted / values.std()
    if hasattr(model, "head") and hasattr(model.head, "ctrness"):
        model.head.bbox_pred.bias.data.fill_(1.0)  # distances must not be negative


def save_decided(folder: Path, name: str, *options: str) -> Path:
    """Saves a run of a shipped config whose detections have clearly different scores."""
    small, sizes = (SMALL, _SIZES)
    if name.startswith("imagenet"):
        small, sizes = (QUICK, _CLASSIFIER_SIZES)
    own = SYSTEMS.get(name, ("",))[0]
    # Without test images, even if another test has made some.
    none = ("DATASETS.TEST", "()")
    words = [*small, *TINY, *own.split(), *OPTIONS.split(), *sizes.split(), *none, *options]
    cfg = contnet.load_config(str(CONFIGS / f"{name}.yaml"), words)
    torch.manual_seed(0)
    model = contnet.build_model(cfg).eval()
    generator = torch.Generator().manual_seed(1)
    if not name.startswith(("imagenet", "cityscapes/pspnet")):
        image = torch.randint(0, 256, (3, 165, 203), generator=generator).float()
        _spread(model, [{"image": image}])
    folder.mkdir(parents=True)
    Checkpointer(model, str(folder), metadata=describe_model(cfg, NAMES)).save("model_final")
    return folder


def run_example(folder: Path, image: Path, hidden: set[str], cwd: Path) -> object:
    """Returns what an export's example prints in a process that cannot import some packages."""
    program = [sys.executable, "-I", "-c", _BOOTSTRAP, ",".join(sorted(hidden))]
    done = subprocess.run(
        [*program, str(folder / "example.py"), str(image)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
