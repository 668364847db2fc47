"""Tests the metadata of files, and what is compared before a model loads them."""

import pickle
import sys

import pytest
import torch
from conftest import QUICK, REPOSITORY, SMALL
from conversions import CONTNET, RESNET, load, ours
from safetensors.torch import save_file

import contnet
from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.metadata import describe_model
from contnet.checkpoint.reading import read_weights
from contnet.config import load_config
from contnet.modeling.build import build_model
from contnet.utils.errors import UserError

pytest_plugins = ["conversions"]

CLASSIFIER, SEGMENTOR = "imagenet/contti.yaml", "cityscapes/pspnet_contti.yaml"
CLASSES = ["cat", "dog"]


def checkpointer(*options, leaf=CONTNET, folder="", classes=CLASSES):
    """Returns the checkpointer of a small model with random weights."""
    small = QUICK if leaf == CLASSIFIER else SMALL
    if leaf == SEGMENTOR:
        small = [*small, "INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice"]
    if leaf == CLASSIFIER:
        small = [*small, "MODEL.CLASSIFIER.NUM_CLASSES", "2"]
    elif leaf.startswith("imagenet/"):
        small = [*QUICK, "MODEL.CLASSIFIER.NUM_CLASSES", "2"]
    elif leaf in (CONTNET, RESNET):
        small = [*small, "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    cfg = load_config(str(REPOSITORY / "configs" / leaf), [*small, *options])
    return Checkpointer(build_model(cfg), str(folder), metadata=describe_model(cfg, classes))


def saved(folder, *options, **settings):
    """Returns the saved checkpoint of such a model."""
    checkpointer(*options, folder=folder, **settings).save("model_final")
    return str(folder / "model_final.pth")


@pytest.fixture
def warnings(caplog):
    """Returns this package's warnings so far, except those about tensors."""
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "WARNING" and ".pth" in record.getMessage()
    ]


# --- refused -------------------------------------------------------------------------------------

OPTIONS = ["PRE_NORM", "RELATIVE", "USE_AVGDOWN", "QKV_BIAS"]
LOADS = {
    "evaluated": (CONTNET, CONTNET, "load"),
    "begun from": (CONTNET, CONTNET, "load_backbone"),
    "a classifier's, evaluated": (CLASSIFIER, CLASSIFIER, "load"),
    "a classifier's, in a detector": (CLASSIFIER, CONTNET, "load_backbone"),
    "a classifier's, in a segmentor": (CLASSIFIER, SEGMENTOR, "load_backbone"),
    "a detector's, in a classifier": (CONTNET, CLASSIFIER, "load_backbone"),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("way", LOADS)
def test_weights_of_another_function_are_refused(tmp_path, way, option):
    source, target, method = LOADS[way]
    key, value = f"MODEL.CONTNET.{option}", str(option != "QKV_BIAS")
    file = saved(tmp_path, key, value, leaf=source)
    model = checkpointer(leaf=target)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    with pytest.raises(UserError, match=f"trained with {key} {value}, but the config has") as error:
        getattr(model, method)(file)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in model.model.state_dict().items())
    getattr(checkpointer(key, value, leaf=target), method)(file)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("leaf", [CONTNET, CLASSIFIER])
def test_pre_norm_of_a_converted_file_must_be_the_configs(convert, leaf, suffix):
    path = str(convert(ours(pre_norm=True), "--pre-norm", target=f"a.{suffix}")[0])
    with pytest.raises(UserError, match="PRE_NORM True, but the config has False"):
        checkpointer(leaf=leaf).load_backbone(path)
    checkpointer("MODEL.CONTNET.PRE_NORM", "True", leaf=leaf).load_backbone(path)


def test_another_variant_is_named(tmp_path):
    file = saved(tmp_path, "MODEL.CONTNET.VARIANT", "contnet_s")
    for method in ("load", "load_backbone"):
        with pytest.raises(
            UserError, match="weights of contnet_s, but the config builds contnet_ti"
        ):
            getattr(checkpointer(), method)(file)


def test_patches_matter_where_convolutions_dilate(tmp_path):
    apart = ("MODEL.CONTNET.DILATED_PATCHES", "False")
    file = saved(tmp_path, *apart, leaf=SEGMENTOR)
    with pytest.raises(UserError, match=r"DILATED_PATCHES False, but the config has True"):
        checkpointer(leaf=SEGMENTOR).load_backbone(file)
    checkpointer(leaf=CONTNET).load_backbone(file)  # does not dilate
    file = saved(tmp_path, *apart, leaf=CONTNET)
    checkpointer(leaf=SEGMENTOR).load_backbone(file)


STRIDES = ("MODEL.RESNETS.STRIDE_IN_1X1", "True")


def test_strides_of_a_resnet_leave_no_trace_either(tmp_path, convert, refuse):
    file = saved(tmp_path, *STRIDES, leaf=RESNET)
    with pytest.raises(UserError, match="STRIDE_IN_1X1 True, but the config has False"):
        checkpointer(leaf=RESNET).load(file)
    assert "STRIDE_IN_1X1" in refuse(file, "--to", "timm")
    converted = str(convert(file)[0])
    with pytest.raises(UserError, match="STRIDE_IN_1X1 True, but the config has False"):
        checkpointer(leaf=RESNET).load_backbone(converted)
    timm_file = str(convert(saved(tmp_path, leaf=RESNET), "--to", "timm")[0])
    tensors = str(tmp_path / "bare.pth")
    torch.save(load(timm_file)[0], tensors)
    for path in (timm_file, tensors):
        checkpointer(leaf=RESNET).load_backbone(path)
        with pytest.raises(UserError, match="STRIDE_IN_1X1 False, but the config has True"):
            checkpointer(*STRIDES, leaf=RESNET).load_backbone(path)


@pytest.mark.parametrize("leaf", [CONTNET, CLASSIFIER])
def test_a_whole_model_is_taken_for_its_own_classes_alone(tmp_path, leaf):
    """A new training loads the head's rows by name (test_heads.py)."""
    with pytest.raises(UserError, match=r"number 0 is dog .*docs/fine_tuning\.md"):
        checkpointer(leaf=leaf, classes=CLASSES[::-1]).load(saved(tmp_path, leaf=leaf))


def test_classes_do_not_matter_where_no_head_is_taken(tmp_path, convert):
    file = saved(tmp_path, leaf=CLASSIFIER)
    checkpointer(leaf=CONTNET, classes=CLASSES[::-1]).load_backbone(file)
    three = ("MODEL.CLASSIFIER.NUM_CLASSES", "3")
    checkpointer(*three, leaf=CLASSIFIER, classes=list("abc")).load_backbone(file)
    dropped = str(convert(file, "--head", "drop")[0])
    checkpointer(leaf=CLASSIFIER, classes=CLASSES[::-1]).load_backbone(dropped)


def test_a_pyramid_knows_no_classes(tmp_path):
    file = saved(tmp_path, "MODEL.RETINANET.NUM_CLASSES", "2", leaf="retinanet_contti.yaml")
    checkpointer(classes=CLASSES[::-1]).load_backbone(file)


def test_timms_tag_changes_nothing(tmp_path):
    """Options of a ConTNet come from MODEL.CONTNET, whatever timm calls it."""
    tagged = ("MODEL.CLASSIFIER.NAME", "contnet_ti.untrained", "MODEL.CONTNET.PRE_NORM", "True")
    file = saved(tmp_path, *tagged, leaf=CLASSIFIER)
    with pytest.raises(UserError, match="PRE_NORM True, but the config has False"):
        checkpointer(leaf=CONTNET).load_backbone(file)
    checkpointer("MODEL.CONTNET.PRE_NORM", "True", leaf=CONTNET).load_backbone(file)


RESNEXT = ("MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "4")


def resnet_classifier(folder, name, *options):
    leaf = "imagenet/res50.yaml"
    return saved(folder, "MODEL.CLASSIFIER.NAME", name, *options, leaf=leaf)


def test_a_wider_resnet_has_timms_name(tmp_path, warnings):
    file = resnet_classifier(tmp_path, "resnext50_32x4d")
    checkpointer(*RESNEXT, leaf=RESNET).load_backbone(file)
    assert not warnings()


def test_another_depth_is_named(tmp_path):
    file = resnet_classifier(tmp_path, "resnet18")
    with pytest.raises(UserError, match=r"resnet18, but the config builds resnet50: .*DEPTH"):
        checkpointer(leaf=RESNET).load_backbone(file)


def test_an_activation_of_timms_is_told_and_not_converted(tmp_path, warnings, refuse):
    silu = ("MODEL.CLASSIFIER.OPTIONS", "[['act_layer', 'silu']]")
    file = resnet_classifier(tmp_path, "resnet50", *silu)
    checkpointer(leaf=RESNET).load_backbone(file)
    (line,) = warnings()
    assert "act_layer silu, now None" in line
    assert "act_layer 'silu'" in refuse(file)


# --- warnings ------------------------------------------------------------------------------------

TOLD = {
    "pixel format RGB, now BGR": ("INPUT.FORMAT", "BGR"),
    "pixel mean": ("MODEL.PIXEL_MEAN", "[0.0, 0.0, 0.0]"),
    "pixel std": ("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"),
    "taps stage, now pre": ("MODEL.CONTNET.TAPS", "pre"),
    "output_stride 8, now 16": ("MODEL.CONTNET.OUTPUT_STRIDE", "16"),
    "norm FrozenBN, now GN": ("MODEL.CONTNET.NORM", "GN"),
}


@pytest.mark.parametrize("said", TOLD)
def test_another_setting_is_one_warning(tmp_path, warnings, said):
    leaf = SEGMENTOR if "stride" in said else CONTNET
    file = saved(tmp_path, leaf=leaf)
    checkpointer(*TOLD[said], leaf=leaf).load_backbone(file)
    (line,) = warnings()
    assert file in line
    assert said in line


def test_another_norm_of_the_same_statistics_is_told_where_all_is_loaded(tmp_path, warnings):
    file = saved(tmp_path)
    checkpointer("MODEL.CONTNET.NORM", "BN").load_backbone(file)
    assert not warnings()
    checkpointer("MODEL.CONTNET.NORM", "BN").load(file)
    assert any("norm FrozenBN, now BN" in line for line in warnings())


def test_drop_rates_are_ones_own_affair(tmp_path, warnings):
    rates = ("DROP_RATE", "0.2", "LAST_DROP_RATE", "0.3", "DROP_PATH_RATE", "0.1")
    rates = [f"MODEL.CONTNET.{word}" if i % 2 == 0 else word for i, word in enumerate(rates)]
    file = saved(tmp_path)
    checkpointer(*rates).load(file)
    checkpointer(*rates).load_backbone(file)
    assert not warnings()


def test_classes_without_names_are_told(tmp_path, warnings):
    nameless, named = saved(tmp_path, classes=None), checkpointer()
    for load_file in (named.load_backbone, named.load):
        load_file(nameless)
        (line,) = named.warnings
        assert line in warnings()
        assert f"{nameless} does not name its classes" in line


def test_what_fits_nowhere_is_no_matter_of_classes(tmp_path):
    file = saved(tmp_path)
    other = Checkpointer(torch.nn.Linear(1, 1), metadata=checkpointer().metadata)
    with pytest.raises(UserError, match="another architecture"):
        other.load(file)


def silent_files(folder):
    """Returns files without metadata about their network."""
    torch.save(ours(), folder / "bare.pth")
    torch.save({"model": ours(), "epoch": 3}, folder / "whole.pth")
    file = saved(folder)
    content = torch.load(file)
    del content["contnet"]
    torch.save({**content, "trainer": {"iteration": 1, "classes": CLASSES}}, folder / "old.pth")
    return [str(folder / f"{name}.pth") for name in ("bare", "whole", "old")]


def test_a_file_that_says_nothing_is_one_warning(tmp_path, warnings, caplog):
    for file in silent_files(tmp_path):
        caplog.clear()
        checkpointer().load_backbone(file)
        (line,) = warnings()
        assert file in line
        assert "MODEL.CONTNET.PRE_NORM False" in line


def test_a_checkpoint_of_the_first_version(tmp_path, warnings):
    file = silent_files(tmp_path)[-1]
    model = checkpointer()
    rest = model.load(file)
    assert rest["trainer"]["iteration"] == 1
    assert len(warnings()) == 1
    expected = torch.load(file)["model"]
    assert all(torch.equal(expected[k], v) for k, v in model.model.state_dict().items())
    with pytest.raises(UserError, match="number 0 is dog"):
        checkpointer(classes=CLASSES[::-1]).load(file)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_converted_file_of_the_first_version(tmp_path, warnings, pre_norm):
    """The first version wrote pre_norm False if it was not given."""
    facts = {"relative": False, "pre_norm": pre_norm, "num_classes": 1000, "in_chans": 3}
    said = {"variant": "contnet_ti", "options": facts, "form": "contnet", "source": "a.pth"}
    file = str(tmp_path / "w.pth")
    torch.save({"model": ours(), "contnet": said}, file)
    checkpointer("MODEL.CONTNET.PRE_NORM", "True").load_backbone(file)
    (line,) = warnings()
    assert ("PRE_NORM" in line) == (not pre_norm)
    if pre_norm:
        with pytest.raises(UserError, match="PRE_NORM True, but the config has False"):
            checkpointer().load_backbone(file)
    with pytest.raises(UserError, match="weights of contnet_ti, but the config builds contnet_s"):
        checkpointer("MODEL.CONTNET.VARIANT", "contnet_s").load_backbone(file)


def _says(**facts):
    return {"format": 1, "network": "contnet_ti", **facts}


def test_versions_are_those_that_a_file_says(tmp_path):
    """The versions are those in the file, not those of the reader."""
    torch.save({"model": ours(), "contnet": _says()}, tmp_path / "w.pth")
    assert read_weights(str(tmp_path / "w.pth")).metadata.versions == {}


DAMAGED = {
    "later": (_says(format=2), "has format 2"),
    "text": ("contnet_ti", "are damaged"),
    "tensor": (torch.zeros(2), "are damaged"),
    "list": ([], "are damaged"),
    "format": (_says(format=torch.zeros(2)), "are damaged"),
    "number": (_says(network=3), "are damaged"),
    "options": (_says(options=[1]), "are damaged"),
    "text for a flag": (_says(options={"pre_norm": "False"}), "are damaged"),
    "tensor for a flag": (_says(options={"pre_norm": torch.zeros(1)}), "are damaged"),
    "text for a number": (_says(options={"output_stride": "8"}), "are damaged"),
    "pixels": (_says(pixels={"mean": torch.zeros(3)}), "are damaged"),
    "classes": (_says(classes=[1, 2]), "are damaged"),
    "first version's": ({"variant": "contnet_ti", "options": "abc"}, "are damaged"),
    "first version's list": ({"variant": "contnet_ti", "options": [1]}, "are damaged"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_metadata_that_are_none_are_one_line(tmp_path, kind):
    said, reason = DAMAGED[kind]
    torch.save({"model": ours(), "contnet": said}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=reason) as error:
        checkpointer().load_backbone(str(tmp_path / "w.pth"))
    assert "w.pth" in str(error.value)
    assert "\n" not in str(error.value)


# --- contents of the metadata --------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [CONTNET, CLASSIFIER, SEGMENTOR, RESNET])
def test_a_checkpoint_says_what_it_is(tmp_path, leaf):
    said = torch.load(saved(tmp_path, leaf=leaf))["contnet"]
    assert said["format"] == 1
    assert said["network"] == ("resnet50" if leaf == RESNET else "contnet_ti")
    assert said["classes"] == CLASSES
    assert said["pixels"]["format"] == "RGB"
    assert said["versions"]["contnet"] == contnet.__version__
    assert "META_ARCHITECTURE" in said["config"]
    if leaf != RESNET:
        network = contnet.create_model(said["network"], **said["options"])
        assert network.num_classes == (2 if leaf == CLASSIFIER else 0)


def test_a_variants_own_rates_are_said():
    said = checkpointer("MODEL.CONTNET.VARIANT", "contnet_b").metadata
    assert (said.options["drop_rate"], said.options["last_drop_rate"]) == (0.1, 0.2)


def test_a_conversion_keeps_what_its_source_says(tmp_path, convert, refuse):
    file = saved(tmp_path, "MODEL.CONTNET.PRE_NORM", "True", leaf=CLASSIFIER)
    path, _ = convert(file, "--check", target="a.safetensors")
    said = load(path)[1]
    assert said["options"]["pre_norm"] is True
    assert said["classes"] == CLASSES
    assert said["pixels"]["format"] == "RGB"
    assert "META_ARCHITECTURE" in said["config"]
    assert load(convert(path, "--head", "drop")[0])[1]["classes"] is None
    assert "say that its ConTNet has pre_norm True" in refuse(path, "--no-pre-norm")


def test_a_conversion_does_not_say_more_than_its_source(tmp_path, convert, warnings):
    path, _ = convert(silent_files(tmp_path)[0], "--no-pre-norm")
    checkpointer().load_backbone(str(path))
    (line,) = warnings()
    assert "PIXEL_MEAN" in line
    assert "PRE_NORM" not in line
    content = torch.load(saved(tmp_path, leaf=RESNET))
    del content["contnet"]
    torch.save(content, tmp_path / "resnet.pth")
    path, lines = convert(str(tmp_path / "resnet.pth"))
    assert any(line.startswith("unknown") for line in lines)
    assert "stride_in_1x1" not in load(path)[1]["options"]


@pytest.mark.parametrize("number", range(3))
def test_a_conversion_asks_for_what_its_source_does_not_say(tmp_path, refuse, convert, number):
    file = silent_files(tmp_path)[number]
    assert "--pre-norm or --no-pre-norm" in refuse(file)
    for answer in (False, True):
        path, _ = convert(file, "--pre-norm" if answer else "--no-pre-norm", "--check")
        assert load(path)[1]["options"]["pre_norm"] is answer


def test_a_conversion_believes_tensors(tmp_path, refuse):
    content = torch.load(saved(tmp_path))
    content["contnet"]["options"]["relative"] = True
    torch.save(content, tmp_path / "a.pth")
    assert "say relative True" in refuse(tmp_path / "a.pth")


# --- read once -----------------------------------------------------------------------------------

_opened = []
sys.addaudithook(lambda event, args: _opened.append(args[0]) if event == "open" else None)


@pytest.mark.parametrize("suffix", ["pth", "pkl", "safetensors", "bin"])
def test_a_file_is_opened_once(tmp_path, suffix):
    path = str(tmp_path / f"w.{suffix}")
    if suffix == "safetensors":
        save_file(ours(), path)
    elif suffix == "pkl":
        arrays = {name: value.numpy() for name, value in ours().items()}
        with open(path, "wb") as file:
            pickle.dump({"model": arrays, "__author__": "us"}, file)
    else:
        torch.save(ours(), path)
    model = checkpointer()
    _opened.clear()
    model.load_backbone(path)
    assert _opened.count(path) == 2  # Python audits its own open, and the system's open within it
    stem = model.model.backbone.bottom_up.stem.weight
    assert torch.equal(stem, ours()["stem.weight"])


@pytest.mark.parametrize("suffix", ["pth", "pkl", "bin", "ckpt"])
def test_the_form_goes_by_content(tmp_path, suffix):
    path = str(tmp_path / f"w.{suffix}")
    save_file(ours(), path)
    model = checkpointer()
    model.load_backbone(path)
    assert torch.equal(model.model.backbone.bottom_up.stem.weight, ours()["stem.weight"])
