"""Tests training with encoders that are compiled by torch.compile."""

import pytest
import timm
import torch
from conftest import REPOSITORY, SMALL, metrics_of
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from networks import difference, images, randomised
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch

from contnet.config import load_config
from contnet.engine.trainer import Trainer
from contnet.modeling.compiled import compile_encoders
from contnet.utils.errors import UsageError

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")
OPTIONS = """
MODEL.META_ARCHITECTURE FirstStage MODEL.BACKBONE.NAME build_contnet_backbone DATASETS.TEST ()
MODEL.CONTNET.OUT_FEATURES ('res2',) MODEL.CONTNET.NORM BN SOLVER.MAX_ITER 2 SOLVER.BASE_LR 0.001
SOLVER.WARMUP_ITERS 0 SOLVER.CHECKPOINT_PERIOD 1 SOLVER.EMA.ENABLED True LOG_PERIOD 1
"""


@META_ARCH_REGISTRY.register()
class FirstStage(nn.Module):
    """A loss of the first stage's features, for only two shapes of encoders."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)

    def forward(self, batch):
        shown = torch.stack([x["image"][:, :48, :48].float() / 255 for x in batch])
        return {"loss": self.backbone(shown)["res2"].square().mean()}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Resets the compiler, so that no test uses another test's graphs."""
    torch._dynamo.reset()
    budget = functorch.activation_memory_budget
    yield
    functorch.activation_memory_budget = budget
    torch._dynamo.reset()


def test_compiled_encoders_keep_less_and_give_the_same():
    model = randomised("contnet_ti").train()
    results = []
    for compiled in (False, True):
        if compiled:
            # This backend partitions by the budget, and needs no C++ compiler.
            compile_encoders(model, 0.5, backend="aot_eager_decomp_partition")
        model.zero_grad()
        model(images((61, 90))).square().mean().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert all(difference(a, b) < 1e-4 for a, b in zip(*results, strict=True))
    assert functorch.activation_memory_budget == 0.5
    assert model.state_dict().keys() == randomised("contnet_ti").state_dict().keys()


def test_a_network_without_encoders_is_refused():
    with pytest.raises(UsageError, match="has no ConTNet"):
        compile_encoders(timm.create_model("resnet18"))


@pytest.mark.long
def test_a_training_with_compiled_encoders(coco_here, tmp_path):
    losses = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        folder.mkdir()
        options = [*SMALL, *OPTIONS.split(), "SOLVER.COMPILE", str(compiled)]
        torch.manual_seed(1)
        counters.clear()
        trainer = Trainer(load_config(LEAF, [*options, "OUTPUT_DIR", str(folder)]), seed=4)
        trainer.fit()
        assert bool(counters["stats"]["unique_graphs"]) == compiled
        losses.append([line["total_loss"] for line in metrics_of(folder)])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    plain, compiled = (torch.load(each)["model"] for each in tmp_path.glob("*/model_final.pth"))
    assert plain.keys() == compiled.keys()
