"""Tests conversions in both directions, which are exact in every format, and heads."""

import pytest
import timm
import torch
import torchvision
from conversions import ALL, COUNT, assert_same, chosen, load, ours, rebuilt, shaken
from oracle import make_oracle

from contnet.checkpoint.key_mapping import (
    convert_resnet_state_dict,
    detectron2_name,
    torchvision_name,
)
from contnet.commands import convert_weights as weights

pytest_plugins = ["conversions"]

OTHERS = [("contnet_s", {}), ("contnet_s", ALL), ("contnet_m", {}), ("contnet_b", ALL)]
# The smallest network has every combination, or each option separately and all together.
CASES = [*(("contnet_ti", chosen(mask)) for mask in range(16)), *OTHERS]
FEWER_CASES = [*(("contnet_ti", chosen(mask)) for mask in (0, 1, 2, 4, 8, 15)), *OTHERS[1:]]


def flag(options):
    """Returns the required options of the command line."""
    return ["--pre-norm"] if options.get("pre_norm") else ["--no-pre-norm"]


# --- the authors' ConTNet ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@torch.no_grad()
def test_the_authors_logits(convert, name, options):
    theirs = make_oracle(name, num_classes=10, **options)
    released = {f"module.{k}": v for k, v in theirs.state_dict().items()}
    path, lines = convert({"model": released, "epoch": 199}, *flag(options))
    _, metadata = load(path)
    assert metadata["network"] == name
    given = {"relative": False, "pre_norm": False, "use_avgdown": False, "qkv_bias": True}
    given |= {"num_classes": 10, "in_chans": 3, **options}
    assert metadata["options"] == given
    image = torch.randn(1, 3, 97, 131)
    torch.testing.assert_close(rebuilt(path)(image), theirs(image), rtol=0, atol=1e-4)
    assert "mapped   module.fc.bias -> head.bias" in lines


@pytest.mark.parametrize("relative", [False, True])
@torch.no_grad()
def test_weights_work_at_every_size(convert, relative):
    theirs = make_oracle("contnet_s", relative=relative)
    model = rebuilt(convert(theirs.state_dict())[0])
    for size in ((32, 32), (97, 131), (160, 192), (224, 224), (288, 320)):
        image = torch.randn(1, 3, *size)
        torch.testing.assert_close(model(image), theirs(image), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), FEWER_CASES, ids=str)
def test_to_ours_and_back_is_exact(convert, name, options):
    theirs = dict(make_oracle(name, **options).state_dict())
    path, _ = convert(theirs, *flag(options), target="a.safetensors")
    back, _ = convert(path, "--to", "authors")
    tensors, metadata = load(back)
    assert tensors.keys() == theirs.keys()
    assert_same(tensors, theirs)
    assert all(torch.equal(value, tensors[k]) for k, value in theirs.items())
    # The first result contains pre_norm, so the second conversion is not given it.
    assert metadata["options"]["pre_norm"] == options.get("pre_norm", False)
    assert metadata["conversion"]["form"] == "authors"
    again, _ = convert(back, "--to", "timm", target="a.safetensors")
    assert_same(load(again)[0], load(path)[0])


def test_leftovers_and_buffers_are_told_and_left(convert):
    state = dict(make_oracle("contnet_ti", relative=True).state_dict())
    state["aux.weight"] = torch.zeros(3)
    path, lines = convert(state)
    assert "dropped  aux.weight (not part of the network)" in lines
    index = "layer1.ConTBlock0.ste1.attn.relative_position_index"
    assert f"dropped  {index} (the network computes it)" in lines
    assert len([line for line in lines if line.startswith("mapped")]) == len(load(path)[0])
    rebuilt(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_half(convert, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ours().items()}
    path, _ = convert(state, "--check", "--to", "authors", target="a.safetensors")
    back = load(convert(path, "--check")[0])[0]
    assert_same(back, state)
    assert back["stem.weight"].dtype == dtype


def test_without_a_head_it_is_told_missing(convert):
    state = {k: v for k, v in ours().items() if not k.startswith("head.")}
    path, lines = convert(state, "--check")
    assert "missing  head.weight" in lines
    assert rebuilt(path).num_classes == 0


# --- ResNets -------------------------------------------------------------------------------------


# Both kinds of blocks.
@pytest.mark.parametrize(("name", "target"), [("resnet18", "r.safetensors"), ("resnet50", "r.pth")])
def test_resnets_there_and_back(convert, name, target):
    theirs = shaken(timm.create_model(name, num_classes=9))
    path, lines = convert(theirs.state_dict(), "--check", target=target)
    tensors, metadata = load(path)
    assert (metadata["network"], metadata["options"]) == (
        name,
        {"num_classes": 9, "stride_in_1x1": False},
    )
    assert "stem.conv1.norm.weight" in tensors
    assert len([line for line in lines if line.startswith("check")]) >= 2
    back, _ = convert(path, "--to", "timm", "--check", target=target)
    assert_same(load(back)[0], theirs.state_dict())
    timm.create_model(name, num_classes=9).load_state_dict(load(back)[0], strict=True)


@pytest.mark.parametrize("name", ["resnet34", "resnet101"])
def test_resnets_of_other_depths(convert, name):
    theirs = shaken(timm.create_model(name, num_classes=9))
    path, _ = convert(theirs.state_dict())
    assert load(path)[1]["network"] == name
    back, _ = convert(path, "--to", "timm")
    assert_same(load(back)[0], theirs.state_dict())


def test_torchvisions_resnet(convert):
    theirs = shaken(torchvision.models.resnet50())
    path, _ = convert(theirs.state_dict(), "--check")
    assert_same(load(path)[0], convert_resnet_state_dict(theirs.state_dict()))


def test_names_of_resnets_are_one_to_one():
    for name in ("resnet18", "resnet34", "resnet50", "resnet101"):
        names = [k for k in timm.create_model(name).state_dict() if not k.endswith(COUNT)]
        assert [torchvision_name(detectron2_name(k)) for k in names] == names
        assert len({detectron2_name(k) for k in names}) == len(names)


OTHER_RESNETS = ("resnet50d", "seresnet50", "resnext50_32x4d", "wide_resnet50_2", "resnet26")


@pytest.mark.parametrize("name", OTHER_RESNETS)
def test_other_resnets_are_refused(refuse, name):
    with torch.device("meta"):
        shapes = timm.create_model(name).state_dict()
    error = refuse({k: torch.zeros(v.shape) for k, v in shapes.items()})
    assert "resnet" in error.lower()


# --- heads ---------------------------------------------------------------------------------------

HEAD_NAMES = {"contnet_ti": "head", "resnet18": "linear"}


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_heads(convert, name):
    whole = timm.create_model(name, num_classes=11).state_dict()
    kept, dropped, new = (load(convert(whole, "--head", head)[0]) for head in ("keep", "drop", "3"))
    head = HEAD_NAMES[name]
    assert kept[0][f"{head}.weight"].shape[0] == 11
    assert f"{head}.weight" not in dropped[0]
    assert new[0][f"{head}.weight"].shape == (3, kept[0][f"{head}.weight"].shape[1])
    assert new[0][f"{head}.bias"].shape == (3,)
    assert 0.005 < new[0][f"{head}.weight"].std() < 0.05
    assert [m["options"]["num_classes"] for _, m in (kept, dropped, new)] == [11, 0, 3]
    for tensors, _ in (dropped, new):
        rest = {k: v for k, v in tensors.items() if not k.startswith(head)}
        assert_same(rest, {k: v for k, v in kept[0].items() if not k.startswith(head)})


def test_a_new_head_is_always_the_same(convert):
    first = load(convert(ours(), "--head", "3")[0])[0]
    source = ours()
    state = torch.get_rng_state()
    assert_same(load(convert(source, "--head", "3")[0])[0], first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("head", ["0", "-1", "some", "1.5"])
def test_other_heads_are_refused(tmp_path, head):
    with pytest.raises(SystemExit):
        weights.main(["a.pth", str(tmp_path / "b.pth"), "--head", head])
