"""Tests the conversion of checkpoints between the authors' key names and ours."""

import itertools

import pytest
import torch
from oracle import VARIANTS, make_oracle

import contnet

NAMES = sorted(VARIANTS)
FLAGS = {"relative": True, "use_avgdown": True, "qkv_bias": False}
COMBINATIONS = [
    dict(chosen)
    for n in range(len(FLAGS) + 1)
    for chosen in itertools.combinations(FLAGS.items(), n)
]
# Every combination for the smallest network, two for the others.
CASES = [(n, o) for n in NAMES for o in (COMBINATIONS if n == "contnet_ti" else ({}, FLAGS))]


def label(options):
    """Returns a readable test id."""
    return "-".join(options) or "default"


def state(name="contnet_ti", **options):
    """Returns a checkpoint's tensors with the authors' names."""
    return dict(make_oracle(name, **options).state_dict())


def with_module(tensors):
    """Returns keys as DistributedDataParallel saves them."""
    return {f"module.{key}": value for key, value in tensors.items()}


def released(tensors):
    """Returns the structure of the released files."""
    return {
        "model": tensors,
        "optimizer": {"state": {}, "param_groups": []},
        "scheduler": {"last_epoch": 3},
        "best_acc1": torch.tensor(77.6),
        "epoch": 199,
    }


WRAPPINGS = {
    "bare": lambda tensors: tensors,
    "bare module": with_module,
    "model": released,
    "model module": lambda tensors: released(with_module(tensors)),
}


def assert_same(a, b):
    """Checks for the same keys, and bit-equal tensors of the same type."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert torch.equal(value, b[key]), key


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_variant_and_options_are_found_and_load_strictly(name, options):
    tensors = state(name, num_classes=11, **options)
    converted, report = contnet.convert_state_dict(tensors)
    assert report.variant == name
    for flag, default in {"relative": False, "use_avgdown": False, "qkv_bias": True}.items():
        assert report.options.get(flag, default) == options.get(flag, default), flag
    model = contnet.create_model(report.variant, **{"num_classes": 11, **report.options})
    model.load_state_dict(converted, strict=True)
    assert_same(dict(model.state_dict()), dict(converted))


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_round_trip_is_exact(name, options):
    tensors = state(name, **options)
    converted, _ = contnet.convert_state_dict(tensors)
    assert_same(dict(contnet.revert_state_dict(converted)), tensors)
    again, report = contnet.convert_state_dict(contnet.revert_state_dict(converted))
    assert_same(dict(again), dict(converted))
    assert (report.missing, report.unexpected) == ([], [])


@pytest.mark.parametrize("options", [{}, {"relative": True}, FLAGS], ids=label)
def test_our_own_state_reverts_to_the_authors_keys(options):
    model = contnet.create_model("contnet_m", **options)
    reverted = contnet.revert_state_dict(model.state_dict())
    theirs = make_oracle("contnet_m", **options)
    theirs.load_state_dict(reverted, strict=True)
    for key, value in theirs.state_dict().items():
        if key.endswith("relative_position_index"):
            assert torch.equal(value, reverted[key])


@pytest.mark.parametrize("wrapping", WRAPPINGS, ids=str)
@pytest.mark.parametrize("options", [{}, FLAGS], ids=label)
def test_wrappings_of_a_checkpoint_are_equivalent(wrapping, options):
    tensors = state("contnet_s", **options)
    expected, _ = contnet.convert_state_dict(tensors)
    converted, report = contnet.convert_state_dict(WRAPPINGS[wrapping](tensors))
    assert_same(dict(converted), dict(expected))
    assert (report.variant, report.missing, report.unexpected) == ("contnet_s", [], [])


@pytest.mark.parametrize("options", COMBINATIONS, ids=label)
def test_report_accounts_for_every_key(options):
    tensors = state(**options)
    converted, report = contnet.convert_state_dict(tensors)
    indices = {key for key in tensors if key.endswith("relative_position_index")}
    assert set(report.mapped) | set(report.dropped) == set(tensors)
    assert not set(report.mapped) & set(report.dropped)
    assert set(report.dropped) <= indices
    assert set(report.mapped.values()) == set(converted)
    assert len(set(report.mapped.values())) == len(report.mapped)
    assert (report.missing, report.unexpected) == ([], [])
    model = contnet.create_model("contnet_ti", **options)
    assert set(converted) == set(model.state_dict())


def test_values_are_not_changed():
    tensors = state()
    converted, report = contnet.convert_state_dict(tensors)
    for theirs, ours in report.mapped.items():
        assert converted[ours].dtype == tensors[theirs].dtype
        assert torch.equal(converted[ours].flatten().sort()[0], tensors[theirs].flatten().sort()[0])


@pytest.mark.parametrize("wrapping", WRAPPINGS, ids=str)
def test_the_given_checkpoint_is_not_modified(wrapping):
    checkpoint = WRAPPINGS[wrapping](state(relative=True))
    inner = checkpoint.get("model", checkpoint)
    keys, values = list(inner), [v.clone() for v in inner.values()]
    outer = list(checkpoint)
    converted, _ = contnet.convert_state_dict(checkpoint)
    before = list(converted)
    contnet.revert_state_dict(converted)
    assert list(checkpoint) == outer
    assert list(inner) == keys
    assert all(torch.equal(a, b) for a, b in zip(values, inner.values(), strict=True))
    assert list(converted) == before


@pytest.mark.parametrize("options", [{}, FLAGS], ids=label)
def test_a_checkpoint_without_classifier_reports_it_missing(options):
    tensors = {k: v for k, v in state(**options).items() if not k.startswith("fc.")}
    converted, report = contnet.convert_state_dict(tensors)
    assert report.variant == "contnet_ti"
    assert len(report.missing) == 2
    assert report.unexpected == []
    model = contnet.create_model("contnet_ti", **options)
    result = model.load_state_dict(converted, strict=False)
    assert len(result.missing_keys) == 2
    assert result.unexpected_keys == []


@pytest.mark.parametrize("wrap", [dict, with_module], ids=["bare", "module"])
def test_extra_keys_are_listed_not_loaded(wrap):
    extra = {"aux.weight": torch.zeros(3), "layer1.ConTBlock0.ste1.attn.extra": torch.zeros(1)}
    converted, report = contnet.convert_state_dict(wrap({**state(), **extra}))
    assert len(report.unexpected) == 2
    assert all(any(u.endswith(key) for u in report.unexpected) for key in extra)
    contnet.create_model("contnet_ti").load_state_dict(converted, strict=True)


def test_a_missing_tensor_is_named():
    tensors = state("contnet_m")
    del tensors["layer2.ConTBlock1.ste2.mlp.fc1.weight"]
    _, report = contnet.convert_state_dict(tensors)
    assert report.variant == "contnet_m"
    assert len(report.missing) == 1
    assert "fc1.weight" in report.missing[0]


def foreign_checkpoints():
    """Returns checkpoints that fit no variant, by reason."""
    ti, small = state(), state("contnet_s")
    deeper = dict(ti)
    for key, value in ti.items():
        deeper[key.replace("layer1.ConTBlock0", "layer1.ConTBlock1")] = value
    wide = {k: torch.zeros([2 * n for n in v.shape]) for k, v in small.items()}
    resnet = {
        "conv1.weight": torch.zeros(64, 3, 7, 7),
        "bn1.weight": torch.zeros(64),
        "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1),
        "fc.weight": torch.zeros(1000, 2048),
    }
    return {
        "empty": {},
        "empty model": {"model": {}},
        "resnet": resnet,
        "wrong depth": deeper,
        "wrong width": wide,
        "no tensors": {"epoch": 3},
        "stem only": {"layer0.conv.conv.weight": ti["layer0.conv.conv.weight"]},
    }


@pytest.mark.parametrize("kind", list(foreign_checkpoints()))
def test_foreign_checkpoints_raise(kind):
    with pytest.raises(ValueError, match=r".{15,}"):
        contnet.convert_state_dict(foreign_checkpoints()[kind])


def test_a_tensor_of_another_shape_raises_or_is_reported():
    tensors = state()
    key = "layer2.ConTBlock0.ste1.mlp.fc1.weight"
    tensors[key] = torch.zeros(7, 96)
    with pytest.raises(ValueError, match="fc1"):
        contnet.convert_state_dict(tensors)


def test_loading_into_our_model_gives_the_same_weights_after_a_round_trip(tmp_path):
    model = contnet.create_model("contnet_ti", relative=True)
    path = tmp_path / "released.pth"
    torch.save(released(with_module(contnet.revert_state_dict(model.state_dict()))), path)
    checkpoint = torch.load(path, weights_only=True)
    converted, _ = contnet.convert_state_dict(checkpoint)
    assert_same(dict(converted), dict(model.state_dict()))


def test_pre_norm_of_a_file_of_ours_is_an_option():
    theirs = state("contnet_ti", pre_norm=True)
    said = {"format": 1, "network": "contnet_ti", "options": {"pre_norm": True}}
    assert contnet.convert_state_dict({"model": theirs, "contnet": said})[1].options["pre_norm"]
    assert "pre_norm" not in contnet.convert_state_dict({"model": theirs})[1].options
