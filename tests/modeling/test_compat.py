"""Tests that only the known warnings of the pinned libraries are silenced.

Functions that are restored for a library that needs them are also tested.
"""

import importlib
import inspect
import io
import logging
import pickle
import re
import subprocess
import sys
import warnings
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.engine import TrainerBase, create_ddp_model
from detectron2.modeling.anchor_generator import _create_grid_offsets
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import nn
from torch.distributed import HashStore

from contnet.modeling.compat import KNOWN_WARNINGS, restore_in1d, silence_known_warnings
from contnet.utils.errors import UserError

pinned = pytest.mark.skipif(
    not torch.__version__.startswith("2.15."), reason="not the PyTorch of the lock"
)

# --- each warning, made where it comes from ------------------------------------------------------


def script_losses(monkeypatch):
    """Imports fvcore's losses, as Detectron2 does."""
    importlib.reload(importlib.import_module("fvcore.nn.focal_loss"))


def make_anchors(monkeypatch):
    """Makes the grid of anchors; PyTorch makes this warning only once per process by default."""
    torch.set_warn_always(True)
    try:
        _create_grid_offsets([2, 2], 4, 0.5, torch.zeros(1))
    finally:
        torch.set_warn_always(False)


def distribute(monkeypatch):
    """Makes a distributed model on the CPU as Detectron2 does."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    try:
        create_ddp_model(nn.Linear(1, 1), broadcast_buffers=False, device_ids=None)
    finally:
        torch.distributed.destroy_process_group()


def skip_first_step(monkeypatch):
    """Uses a loss scaler whose scale is too high at the first step."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum() * 1e38).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.item() == 1
    scheduler.step()


def load_a_pickle(monkeypatch):
    """Loads a pickle that torch.save did not write."""
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(pickle.dumps({"a": 1}, protocol=4)), weights_only=True)


SOURCES = {
    "torch.jit.script": script_losses,
    "torch.meshgrid": make_anchors,
    "broadcast_buffers": distribute,
    "lr_scheduler": skip_first_step,
    "pickle protocol": load_a_pickle,
}


def source_of(message):
    """Returns the function that makes the warning with this pattern."""
    (found,) = (make for name, make in SOURCES.items() if name in message.replace("\\", ""))
    return found


def caught(make, monkeypatch, quiet):
    """Returns the warnings that ``make`` shows, as (category, message)."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        if quiet:
            silence_known_warnings()
        make(monkeypatch)
    return [(w.category, str(w.message)) for w in record]


def fits(found, category, message):
    """Returns whether a pattern of the table matches in the way of the filters."""
    return issubclass(found[0], category) and re.match(message, found[1], re.IGNORECASE)


def named(value):
    """Returns a readable test id."""
    return next((name for name in SOURCES if name in str(value).replace("\\", "")), "")


def test_every_known_warning_has_its_source_here():
    assert len(KNOWN_WARNINGS) == len(SOURCES)
    assert {source_of(message) for _, message, _ in KNOWN_WARNINGS} == set(SOURCES.values())


@pinned
@pytest.mark.parametrize(("category", "message", "origin"), KNOWN_WARNINGS, ids=named)
def test_the_pinned_libraries_still_make_it(monkeypatch, category, message, origin):
    found = caught(source_of(message), monkeypatch, quiet=False)
    assert any(fits(one, category, message) for one in found), f"drop this filter; only {found}"


@pytest.mark.parametrize(("category", "message", "origin"), KNOWN_WARNINGS, ids=named)
def test_it_is_silent(monkeypatch, category, message, origin):
    found = caught(source_of(message), monkeypatch, quiet=True)
    assert not any(fits(one, category, message) for one in found)


@pinned
@pytest.mark.parametrize(("category", "message", "origin"), KNOWN_WARNINGS, ids=named)
def test_another_warning_of_the_same_category_is_not(monkeypatch, category, message, origin):
    (known, *_) = caught(source_of(message), monkeypatch, quiet=False)
    others = ["something else", f"torch: {known[1]}", f"{known[1][:20]}?"]

    def make(monkeypatch):
        for text in others:
            warnings.warn(text, category, stacklevel=1)

    assert caught(make, monkeypatch, quiet=True) == [(category, text) for text in others]


def test_the_same_text_of_another_category_is_not(monkeypatch):
    message = "`torch.jit.script` is deprecated. Please switch to `torch.compile`"

    def make(monkeypatch):
        warnings.warn(message, RuntimeWarning, stacklevel=1)

    assert caught(make, monkeypatch, quiet=True) == [(RuntimeWarning, message)]


def test_filters_are_not_added_twice():
    with warnings.catch_warnings():
        silence_known_warnings()
        filters = list(warnings.filters)
        silence_known_warnings()
        assert warnings.filters == filters


# --- tracebacks of users' mistakes ---------------------------------------------------------------


class Failing(TrainerBase):
    """Detectron2's loop with a step that fails."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def run_step(self):
        raise self.error


@pytest.fixture
def loop_records():
    """Returns the log records of Detectron2's training loop, after its filters."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    loop = logging.getLogger("detectron2.engine.train_loop")
    filters, level = list(loop.filters), loop.level
    loop.addHandler(handler)
    loop.setLevel(logging.INFO)
    yield records
    loop.removeHandler(handler)
    loop.filters, loop.level = filters, level


@pytest.mark.parametrize(
    ("error", "shown"), [(UserError("the loss is not finite"), False), (ValueError("bug"), True)]
)
def test_tracebacks_are_shown_for_bugs_only(loop_records, error, shown):
    with warnings.catch_warnings():
        silence_known_warnings()
    with pytest.raises(type(error)):
        Failing(error).train(0, 1)
    assert any(record.exc_info for record in loop_records) == shown


def test_without_the_filter_a_traceback_is_shown(loop_records):
    """Fails if Detectron2's loop no longer logs the error that ends it."""
    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.filters = []
    with pytest.raises(UserError):
        Failing(UserError("the loss is not finite")).train(0, 1)
    assert any(record.exc_info for record in loop_records)


# --- PyTorch's advice about tracing --------------------------------------------------------------


@pytest.fixture
def tracing_lines():
    """Returns PyTorch's log lines about tracing after its filters, as in a new process."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("torch.fx._symbolic_trace")
    filters, logger.filters = list(logger.filters), []
    logger.addHandler(handler)
    torch.fx._symbolic_trace.is_fx_tracing_warning.cache_clear()
    yield lines
    logger.removeHandler(handler)
    logger.filters = filters


@pinned
@pytest.mark.parametrize("quiet", [False, True])
def test_advice_about_tracing_is_silent(tracing_lines, quiet):
    """Without the filter it is shown; fails if Detectron2's pooler no longer causes it."""
    if quiet:
        with warnings.catch_warnings():
            silence_known_warnings()
    pooler = ROIPooler(2, scales=[0.25], sampling_ratio=0, pooler_type="ROIAlignV2")
    pooler([torch.zeros(1, 1, 8, 8)], [Boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0]]))])
    assert [line[:13] for line in tracing_lines] == ([] if quiet else ["is_fx_tracing"])
    logging.getLogger("torch.fx._symbolic_trace").warning("something else")
    assert tracing_lines[-1] == "something else"


# --- np.in1d -------------------------------------------------------------------------------------


def test_cityscapesscripts_still_needs_in1d():
    assert not hasattr(np, "in1d")
    module = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    assert "np.in1d" in inspect.getsource(module)


def test_in1d_is_given_to_one_module():
    module, before = ModuleType("theirs"), set(vars(np))
    module.np = np
    restore_in1d(module)
    assert module.np.in1d([[1, 2], [3, 4]], [2, 5]).reshape(2, 2).tolist() == [[0, 1], [0, 0]]
    assert module.np.in1d([1, 2], [2], invert=True).tolist() == [True, False]
    assert module.np.unique is np.unique and set(vars(np)) == before


def test_focal_loss_is_scripted_upstream_and_plain_here():
    program = """
import torch
from detectron2.modeling.meta_arch import fcos, retinanet
scripted = fcos.sigmoid_focal_loss_jit
assert isinstance(scripted, torch.jit.ScriptFunction), "the cure is no longer needed"
from contnet.modeling.compat import use_plain_focal_loss
use_plain_focal_loss()
x, y = torch.randn(50, 3), torch.randint(0, 2, (50, 3)).float()
for module in (fcos, retinanet):
    plain = module.sigmoid_focal_loss_jit
    assert not isinstance(plain, torch.jit.ScriptFunction)
    torch.testing.assert_close(plain(x, y, 0.25, 2.0, "sum"), scripted(x, y, 0.25, 2.0, "sum"))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
