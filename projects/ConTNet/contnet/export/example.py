"""The example script of an export, which runs where this project is not installed."""

from __future__ import annotations

__all__ = ["make_example"]

_HEAD = '''\
"""Runs the model on an image: python example.py IMAGE. Needs {packages}."""

import json
import sys
from pathlib import Path

import numpy as np
{imports}
from PIL import Image, ImageOps

folder = Path(__file__).parent
facts = json.loads((folder / "model.json").read_text())
image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
'''

_SHORTEST_EDGE = """\
scale = min(facts["short_side"] / min(image.size), facts["longest_side"] / max(image.size))
small = image.resize([int(side * scale + 0.5) for side in image.size], Image.BILINEAR)
"""
_AS_IT_IS = """\
small = image
"""
_CENTRE_CROP = """\
scale, crop = facts["resize"] / min(image.size), facts["crop"]
size = [max(facts["resize"], int(side * scale + 1e-6)) for side in image.size]
left, top = (round((side - crop) / 2) for side in size)
small = image.resize(size, Image.{interpolation}).crop((left, top, left + crop, top + crop))
"""

_PIXELS = """\
pixels = np.asarray(small, np.float32)[..., facts["channels"]].transpose(2, 0, 1)[None]
"""

_RUN = {
    "onnx": (
        "import onnxruntime",
        'session = onnxruntime.InferenceSession(folder / "model.onnx")\n'
        'outputs = session.run(None, {"images": pixels})\n',
    ),
    "torch-export": (
        "import torch\nimport torchvision  # noqa: F401, its operators",
        'model = torch.export.load(folder / "model.pt2").module()\n'
        "outputs = [each.detach().numpy() for each in model(torch.from_numpy(pixels))]\n",
    ),
    "torchscript": (
        "import torch\nimport torchvision  # noqa: F401, its operators",
        'model = torch.jit.load(folder / "model.pt")\n'
        "outputs = [each.detach().numpy() for each in model(torch.from_numpy(pixels))]\n",
    ),
}

_DETECTIONS = """\
boxes = outputs[0] * np.tile(np.divide(image.size, small.size), 2)
names = [facts["classes"][number] for number in outputs[2]]
print(json.dumps([names, outputs[1].tolist(), boxes.tolist()]))
"""
# Pastes each mask into its box, with bilinear weights of the mask's rows and columns per pixel.
_MASKS = """\
masks, (w, h), cells = [], image.size, np.arange(outputs[3].shape[-1])[:, None]
for mask, (x0, y0, x1, y1) in zip(outputs[3], boxes):
    rows = (np.arange(h) + 0.5 - y0) / (y1 - y0) * len(cells) - 0.5 - cells
    columns = (np.arange(w) + 0.5 - x0) / (x1 - x0) * len(cells) - 0.5 - cells
    rows, columns = (np.clip(1 - abs(each), 0, 1) for each in (rows, columns))
    masks.append(rows.T @ mask @ columns >= 0.5)
np.save("masks.npy", np.array(masks, bool).reshape(-1, h, w))
"""
_LABEL_MAP = """\
logits = [Image.fromarray(each).resize(image.size, Image.BILINEAR) for each in outputs[0][0]]
labels = np.argmax(np.stack([np.asarray(each) for each in logits]), axis=0).astype(np.uint8)
Image.fromarray(labels).save("labels.png")
print(json.dumps([facts["classes"][number] for number in np.unique(labels)]))
"""
_BEST_CLASSES = """\
scores = np.exp(outputs[0][0] - outputs[0][0].max())
best = np.argsort(-scores)[:5]
print(json.dumps([[facts["classes"][k], float(scores[k] / scores.sum())] for k in best]))
"""
_FEATURES = """\
print(json.dumps([[name, each.shape] for name, each in zip(facts["outputs"], outputs)]))
"""


def make_example(facts: dict) -> str:
    """Returns a script of at most 20 lines of code that runs the model on an image.

    Args:
        facts: the result of :func:`contnet.export.folder.describe_export`.
    """
    imports, run = _RUN[facts["format"]]
    head = _HEAD.format(packages=", ".join(facts["packages"]), imports=imports)
    if "crop" in facts:
        resize = _CENTRE_CROP.format(interpolation=facts["interpolation"].upper())
    else:
        resize = _SHORTEST_EDGE if facts["short_side"] else _AS_IT_IS
    endings = {"boxes": _DETECTIONS, "semantic": _LABEL_MAP, "logits": _BEST_CLASSES}
    ending = endings.get(facts["outputs"][0], _FEATURES)
    if "masks" in facts["outputs"]:
        ending += _MASKS
    return head + resize + _PIXELS + run + ending
