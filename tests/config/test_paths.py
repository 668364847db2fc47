"""Tests that ~ and environment variables are expanded in paths of config files and overrides."""

import pytest
import yaml
from conftest import REPOSITORY

from contnet.config import is_set, load_config, load_finished_config
from contnet.config.paths import expand_path
from contnet.utils.errors import UserError

LEAF = str(REPOSITORY / "configs" / "faster_rcnn_contti.yaml")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Sets a home folder and variables; W is not set."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", f"{tmp_path}/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("W", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/x", "{home}/x"),
        ("~", "{home}"),
        ("$DATA/x", "{home}/data/x"),
        ("${DATA}x/$DATA", "{home}/datax/{home}/data"),
        ("x/$$DATA", "x/$DATA"),
        ("cost$", "cost$"),
        ("5$ and $5", "5$ and $5"),
        ("x~/y", "x~/y"),
        ("https://host/~me/$W", "https://host/~me/$W"),
        ("", ""),
    ],
)
def test_a_path(home, path, expected):
    assert expand_path(path, "KEY") == expected.format(home=home)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("$W/x", "KEY is '$W/x', but the environment variable W is not set"),
        ("a/${W}", "the environment variable W is not set"),
        ("$EMPTY/x", "the environment variable EMPTY is not set"),
        ("${DATA/x", "a variable is written ${NAME}"),
        ("~nobody.such/x", "there is no user nobody.such"),
    ],
)
def test_what_stands_for_nothing_is_named(path, said):
    with pytest.raises(UserError) as caught:
        expand_path(path, "KEY")
    assert said in str(caught.value)


def test_a_file_whose_name_has_a_sign_can_be_given_as_it_is(tmp_path):
    path = tmp_path / "a$W"
    path.touch()
    assert expand_path(str(path), "KEY") == str(path)


PATHS = {
    "MODEL.WEIGHTS": ("~/w.pth", "{home}/w.pth"),
    "OUTPUT_DIR": ("${DATA}/run", "{home}/data/run"),
    "DATASETS.CACHE_DIR": ("$DATA/cache", "{home}/data/cache"),
    "DATASETS.PROPOSAL_FILES_TRAIN": (("~/a.pkl", "$DATA/b"), ("{home}/a.pkl", "{home}/data/b")),
    "DATASETS.PROPOSAL_FILES_TEST": (("~/a.pkl",), ("{home}/a.pkl",)),
    "DATASETS.REGISTER": (
        [["mine", "$DATA/a.json", "~/images"]],
        [["mine", "{home}/data/a.json", "{home}/images"]],
    ),
}


def fill(value, home):
    if isinstance(value, str):
        return value.format(home=home)
    return type(value)(fill(each, home) for each in value)


def write(file, **content):
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(content))
    return str(file)


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("way", ["file", "override"])
def test_every_path_of_a_config(home, key, way):
    given, expected = PATHS[key]
    opts = [key, str(given)]
    file = LEAF
    if way == "file":
        node = list(given) if isinstance(given, tuple) else given
        for part in reversed(key.split(".")):
            node = {part: node}
        file, opts = write(home / "own.yaml", _BASE_=LEAF, **node), []
    cfg = load_config(file, opts)
    for part in key.split("."):
        cfg = cfg[part]
    assert cfg == fill(expected, home)


@pytest.mark.parametrize("key", PATHS)
def test_an_unset_variable_names_its_key(key):
    value = {"DATASETS.REGISTER": "[['mine', '$W/a', 'b']]"}.get(key, "$W/x")
    value = "('$W/x',)" if "PROPOSAL" in key else value
    with pytest.raises(UserError, match=rf"{key} is '\$W/.'?.*variable W is not set"):
        load_config(LEAF, [key, value])


@pytest.mark.parametrize(
    "base", ["$DATA/base.yaml", "~/data/base.yaml", "../data/${NAME}.yaml", ["$DATA/base.yaml"]]
)
def test_a_base(home, monkeypatch, base):
    monkeypatch.setenv("NAME", "base")
    write(home / "data" / "base.yaml", _BASE_=LEAF, SEED=5, OUTPUT_DIR="~/run")
    file = write(home / "own" / "own.yaml", _BASE_=base, LOG_PERIOD=3)
    cfg = load_config(file)
    assert (5, 3, f"{home}/run") == (cfg.SEED, cfg.LOG_PERIOD, cfg.OUTPUT_DIR)


def test_an_unset_variable_in_a_base_names_the_file(home):
    file = write(home / "own.yaml", _BASE_="$W/base.yaml")
    with pytest.raises(UserError, match=r"own.yaml: _BASE_ is .*variable W is not set"):
        load_config(file)


def test_the_config_file_itself(home):
    write(home / "data" / "own.yaml", _BASE_=LEAF, SEED=5)
    for file in ("~/data/own.yaml", "$DATA/own.yaml"):
        assert load_config(file).SEED == 5
        assert is_set("SEED", file, [])


def test_what_a_run_keeps_is_read_back_as_it_is(home, monkeypatch):
    cfg = load_config(LEAF, ["OUTPUT_DIR", "$DATA/a$$b", "MODEL.WEIGHTS", "~/w.pth"])
    assert f"{home}/data/a$b" == cfg.OUTPUT_DIR
    (home / "data" / "a$b").mkdir(parents=True)
    file = home / "data" / "a$b" / "config.yaml"
    file.write_text(cfg.dump())
    monkeypatch.delenv("DATA")
    for again in (load_config(str(file)), load_finished_config(str(file))):
        assert again.OUTPUT_DIR == cfg.OUTPUT_DIR
        assert f"{home}/w.pth" == again.MODEL.WEIGHTS
