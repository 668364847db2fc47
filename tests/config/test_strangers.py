"""Tests untrusted configs with addresses, bombs and passwords; each error is one line."""

import os
import socket
import threading
import time

import pytest
from conftest import QUICK, REPOSITORY

from contnet.config import load_config
from contnet.launch.preflight_config import load_checked_config
from contnet.utils.addresses import redact
from contnet.utils.errors import UserError
from contnet.utils.yaml_text import LARGEST_YAML

LEAF = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}, *a{i}, *a{i}]\n" for i in range(12)
)
BOMBS = {
    "aliases": LAUGHS,
    "merged aliases": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(9)),
    "an alias of itself": "SOLVER: &s {STEPS: *s}",
    "a deep list": "SOLVER: " + "[" * 3000,
    "a deep mapping": "SOLVER: " + "{a: " * 3000,
    "a number of many digits": "SEED: " + "9" * 10_000,
    "a hexadecimal number of many digits": "SEED: 0x" + "f" * 10_000,
    "a number of many parts": "SEED: 1" + ":1" * 400 + ".5",
    "a day that there is not": "OUTPUT_DIR: 2026-13-45",
    "a long text": "OUTPUT_DIR: " + "x" * LARGEST_YAML,
    # The text after the limit must not be ignored.
    "a long text of wide letters": "# " + "中" * 80_000 + "\n" * 50_000 + "SEED: 1",
    "a tag of Python": "OUTPUT_DIR: !!python/object/apply:os.system ['touch ran']",
    "a control character": "OUTPUT_DIR: \x07",
}


@pytest.mark.parametrize("place", ["file", "base"])
@pytest.mark.parametrize("kind", BOMBS)
def test_yaml_is_bounded(tmp_path, kind, place):
    (tmp_path / "bomb.yaml").write_text(BOMBS[kind])
    (tmp_path / "base.yaml").write_text("_BASE_: bomb.yaml")
    with pytest.raises(UserError, match=r"bomb\.yaml") as error:
        load_config(str(tmp_path / ("bomb.yaml" if place == "file" else "base.yaml")))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert not (tmp_path / "ran").exists()


def test_an_override_has_no_endless_number():
    for key, value in (("SEED", "0x" + "f" * 5000), ("SOLVER.STEPS", f"(1, 0x{'f' * 5000})")):
        with pytest.raises(UserError, match=key):
            load_config(LEAF, [key, value])


def test_anchors_may_be_used(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "SOLVER: {STEPS: &s [1, 2], MAX_ITER: 3}\nTEST: {EXPECTED_RESULTS: *s}"
    )
    assert tuple(load_config(str(tmp_path / "a.yaml")).SOLVER.STEPS) == (1, 2)


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "file", "detectron2", "hf"])
def test_no_address_is_a_config_or_its_base(tmp_path, scheme):
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = []
        threading.Thread(target=lambda: asked.append(server.accept()), daemon=True).start()
        address = f"{scheme}://127.0.0.1:{server.getsockname()[1]}/../../base.yaml"
        (tmp_path / "a.yaml").write_text(f"_BASE_: {address}")
        (tmp_path / "b.yaml").write_text(f"_BASE_: [{LEAF}, '{address}']")
        for file in (str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), address):
            with pytest.raises(UserError, match="is a URL"):
                load_config(file)
        assert not asked


def test_bases_that_include_each_other_many_times_end(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.yaml").write_text(f"_BASE_: [{i + 1}.yaml, {i + 1}.yaml, {i + 1}.yaml]")
    (tmp_path / "20.yaml").write_text("SEED: 1")
    with pytest.raises(UserError, match="includes itself"):
        load_config(str(tmp_path / "0.yaml"))


def test_a_config_that_is_no_file_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml")
    for name in ("a.yaml", "b.yaml"):
        with pytest.raises(UserError, match=r"a\.yaml"):
            load_config(str(tmp_path / name))


SECRET = "s3cr3t"
ADDRESSES = {
    f"https://user:{SECRET}@host/w.pth": "https://***@host/w.pth",
    f"https://{SECRET}@host:80/w.pth?a=1": "https://***@host:80/w.pth?a=1",
    f"https://host/w.pth?version=1&token={SECRET}": "https://host/w.pth?version=1&token=***",
    f"https://host/w.pth?X-Amz-Signature={SECRET}&x=1": "https://host/w.pth?X-Amz-Signature=***&x=1",
    f"https://host/w.pth?sv=1&sig={SECRET}": "https://host/w.pth?sv=1&sig=***",
    f"https://host/w.pth#access_token={SECRET}": "https://host/w.pth#access_token=***",
    f"https://host/w.pth?a=b?token={SECRET}?{SECRET}": "https://host/w.pth?a=b?token=***",
    f"s3://key:p@{SECRET}@bucket/x": "s3://***@bucket/x",
}
HARMLESS = (
    "https://host/w.pth?version=2&download=true#sha256=01234567",
    "hf://owner/repository@main/model.safetensors",
    "https://host/a@b/design?monkeys=3",
    "https://host/download?id=1a&export=download&authuser=0",
    "https://host/w.pth?author=bob&zip_code=1",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_password_is_refused_and_shown_nowhere(tmp_path, capsys, address):
    from contnet.launch.main import main

    assert redact(f"see '{address}', or {address}") == "see '{0}', or {0}".format(
        ADDRESSES[address]
    )
    out = tmp_path / "out"
    (tmp_path / "a.yaml").write_text(f"_BASE_: {LEAF}\nMODEL: {{WEIGHTS: '{address}'}}")
    lines = [["--config-file", LEAF, "MODEL.WEIGHTS", address, "MODEL.WEIGHTS", "a.pth"]]
    lines += [["--config-file", str(tmp_path / "a.yaml"), "MODEL.WEIGHTS", ""]]
    lines += [["--config-file", LEAF, f"MODEL.WEIGHTS={address}"], ["--config-file", address]]
    for line in lines:
        assert main([*line, *QUICK, "OUTPUT_DIR", str(out)]) in (1, 2)
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err and said.err.startswith("error: ")
    assert not out.exists()


def test_addresses_without_passwords_are_left_as_they_are():
    for address in HARMLESS:
        assert redact(address) == address
        assert address == load_config(LEAF, ["MODEL.WEIGHTS", address]).MODEL.WEIGHTS


@pytest.mark.parametrize("part", ["token", "?", "?token", "=***", "&a=", "auth_", "://"])
def test_a_long_address_takes_no_time(part):
    start = time.process_time()
    redact("http://h/?" + part * 50_000)
    assert time.process_time() - start < 1


LOADERS = {
    "MODEL.CLASSIFIER.OPTIONS": "[['checkpoint_path', 'evil.pth']]",
    "DATASETS.PROPOSAL_FILES_TEST": "('evil.pkl',)",
    "DATASETS.PROPOSAL_FILES_TRAIN": "('evil.pkl',)",
    "MODEL.CLASSIFIER.NAME": "local-dir:evil",
}


@pytest.mark.parametrize("key", LOADERS)
def test_other_libraries_load_no_files(key):
    options = [] if key.endswith("NAME") else ["MODEL.CLASSIFIER.NAME", "resnet18"]
    load_checked_config(LEAF, options)
    with pytest.raises(UserError, match=key):
        load_checked_config(LEAF, [*options, key, LOADERS[key]])
