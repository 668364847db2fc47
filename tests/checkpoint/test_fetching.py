"""Tests weights with an address: from a local server, and from the libraries' caches."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
import timm
import torch
from conftest import QUICK, REPOSITORY, SMALL
from safetensors.torch import save as save_safetensors

from contnet.checkpoint import fetching
from contnet.checkpoint.fetching import fetch_weights
from contnet.checkpoint.reading import read_weights
from contnet.utils.errors import UserError


class Server:
    """Serves files of a dictionary by path with the headers of the hub; counts what is sent."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.asked: list[str] = []
        self.behaviour = ""
        self.half_sent = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, body):
                path = self.path
                outer.asked.append(path)
                content = outer.files.get(path.partition("?")[0])
                if content is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if outer.behaviour == "slow":
                    time.sleep(5)
                if outer.behaviour.startswith("to "):
                    self.send_response(302)
                    self.send_header("Location", outer.behaviour.removeprefix("to "))
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.end_headers()
                if body:
                    outer.sent.append(path)
                    half = len(content) // 2 if outer.behaviour in ("cut", "half") else len(content)
                    self.wfile.write(content[:half])
                    if outer.behaviour == "half":
                        outer.half_sent.set()
                        time.sleep(5)

            def do_GET(self):
                self.answer(True)

            def do_HEAD(self):
                self.answer(False)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def payload(value=1.0):
    return save_safetensors({"weight": torch.full((3,), value)})


def kept(cache):
    """Returns the files in the cache, except locks."""
    files = (path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(files)


# --- URLs ----------------------------------------------------------------------------------------


def test_a_url_is_fetched_once(server, cache):
    server.files["/a/w.safetensors"] = payload()
    url = f"{server.url}/a/w.safetensors"
    for _ in range(2):
        assert torch.equal(read_weights(url).tensors["weight"], torch.ones(3))
    assert len(server.sent) == 1
    server.server.shutdown()
    assert Path(fetch_weights(url).path) in kept(cache)


def test_files_of_one_name_are_kept_apart(server, cache):
    other = Server()
    server.files["/w.pth"], other.files["/w.pth"] = payload(1), payload(2)
    server.files["/b/w.pth"] = payload(3)
    urls = [f"{server.url}/w.pth", f"{other.url}/w.pth", f"{server.url}/b/w.pth"]
    urls.append(f"{server.url}/w.pth?version=2")
    found = [read_weights(url).tensors["weight"][0].item() for url in urls]
    assert found == [1, 2, 3, 1]
    assert len(kept(cache)) == 4
    other.server.shutdown()
    other.server.server_close()


def test_the_hash_is_compared(server, cache):
    server.files["/w.pth"] = payload()
    digest = hashlib.sha256(payload()).hexdigest()
    for right in (digest, digest[:8], digest.upper()):
        fetch_weights(f"{server.url}/w.pth#sha256={right}")
    assert len(server.sent) == 1
    wrong = f"{server.url}/w.pth#sha256={'0' * 64}"
    with pytest.raises(UserError, match=f"begins with {digest[:16]}"):
        fetch_weights(wrong)
    # A newer file on the server replaces the cached one.
    server.files["/w.pth"] = payload(2)
    new = hashlib.sha256(payload(2)).hexdigest()
    assert read_weights(f"{server.url}/w.pth#sha256={new}").tensors["weight"][0] == 2


def test_a_wrong_file_is_not_kept(server, cache):
    server.files["/w.pth"] = payload()
    with pytest.raises(UserError, match="is another file"):
        fetch_weights(f"{server.url}/w.pth#sha256={'0' * 64}")
    assert kept(cache) == []


@pytest.mark.parametrize("fragment", ["md5=1", "sha256=12", "sha256=xyz", "x"])
def test_what_is_no_hash_is_named(fragment):
    with pytest.raises(UserError, match=f"#{fragment}"):
        fetch_weights(f"http://127.0.0.1:9/w.pth#{fragment}")


FAILURES = {
    "absent": ("/none.pth", "", "the server says 404"),
    "cut": ("/w.pth", "cut", "truncated"),
    "to a file": ("/w.pth", "to file:///etc/passwd", "edirect"),
    "to FTP": ("/w.pth", "to ftp://127.0.0.1/w.pth", "edirect"),
    "to data": ("/w.pth", "to data:,x", "edirect"),
    "in circles": ("/w.pth", "to /w.pth", "302"),
    "slow": ("/w.pth", "slow", "timed out"),
    "no server": ("", "", "Connection refused"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_one_line_and_leaves_nothing(server, cache, monkeypatch, kind):
    path, server.behaviour, said = FAILURES[kind]
    monkeypatch.setattr(fetching, "_TIMEOUT", 0.5)
    server.files["/w.pth"] = payload() * 50
    url = server.url + path if path else "http://127.0.0.1:9/w.pth"
    with pytest.raises(UserError) as error:
        fetch_weights(url)
    assert said in str(error.value) and url in str(error.value)
    assert "\n" not in str(error.value)
    assert kept(cache) == []
    server.behaviour = ""
    if path == "/w.pth":  # another attempt can fetch it
        assert fetch_weights(url).path


def test_a_full_disk_leaves_nothing(server, cache):
    """/dev/full stands for a full disk."""
    server.files["/w.pth"] = payload() * 10_000
    path = Path(fetch_weights(f"{server.url}/w.pth").path)
    path.unlink()
    path.with_name("w.pth.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"No space left on device.*FVCORE_CACHE"):
        fetch_weights(f"{server.url}/w.pth")
    assert kept(cache) == []


def test_a_killed_download_is_not_taken_for_whole(server, cache):
    server.files["/w.pth"], server.behaviour = payload() * 10_000, "half"
    url = f"{server.url}/w.pth"
    program = f"from contnet.checkpoint.fetching import fetch_weights; fetch_weights({url!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    assert server.half_sent.wait(60)
    process.kill()
    process.wait()
    server.behaviour = ""
    assert Path(fetch_weights(url).path).read_bytes() == server.files["/w.pth"]
    assert len(kept(cache)) == 1


PATHS = (
    *(
        "/../../../../w.pth",
        "/%2e%2e/%2e%2e/%2e%2e/w.pth",
        "/..%2f..%2f..%2fw.pth",
        "/..\\..\\w.pth",
    ),
    *(
        "/a//w.pth",
        "/a/../w.pth",
        "/.w.pth",
        "/..",
        "/",
        "/" + "x" * 1000,
        "/%00w.pth",
        "/a%0ab.pth",
    ),
)


def test_no_path_leads_out_of_the_cache_and_each_has_its_file(server, tmp_path, cache):
    found = {}
    for number, path in enumerate(PATHS):
        server.files[path] = payload(number)
        found[path] = Path(fetch_weights(server.url + path).path)
    assert len(set(found.values())) == len(PATHS)
    for number, path in enumerate(PATHS):
        assert found[path].resolve().is_relative_to(cache)
        assert found[path].read_bytes() == payload(number)
    assert {each.name for each in tmp_path.iterdir()} == {"cache"}


def test_the_hash_in_a_name_is_compared(server):
    digest = hashlib.sha256(payload()).hexdigest()
    for name in (f"w-{digest[:8]}.pth", "w-20200130.pth", "w-12.pth"):
        server.files[f"/{name}"] = payload()
        assert fetch_weights(f"{server.url}/{name}").path
    server.files["/w-0123abcd.pth"] = payload()
    with pytest.raises(UserError, match="is another file"):
        fetch_weights(f"{server.url}/w-0123abcd.pth")


def test_a_file_of_the_cache_that_was_exchanged_is_fetched_again(server):
    server.files["/w.pth"] = payload()
    url = f"{server.url}/w.pth#sha256={hashlib.sha256(payload()).hexdigest()}"
    Path(fetch_weights(url).path).write_bytes(payload(2))
    assert read_weights(url).tensors["weight"][0] == 1


NO_ADDRESSES = ("file:///etc/passwd", "ftp://127.0.0.1/w.pth", "s3://a/w.pth", "data://x", "://x")


@pytest.mark.parametrize("address", [*NO_ADDRESSES, "hf://a/b@../../../c.pth", "hf://a/b/../../c"])
def test_other_addresses_are_refused(address):
    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS"):
        fetch_weights(address)


def test_a_password_is_not_sent_and_not_shown(server):
    address = server.url.replace("://", "://user:s3cr3t@") + "/w.pth"
    for read in (fetch_weights, read_weights):
        with pytest.raises(UserError, match="HF_TOKEN") as error:
            read(address)
        assert "s3cr3t" not in str(error.value)
    assert not server.asked


# --- the hub, whose library reads its settings at import -----------------------------------------

_ASK = """
import json, sys
from contnet.checkpoint.reading import read_weights
from contnet.utils.errors import UserError
for address in sys.argv[1:]:
    try:
        weights = read_weights(address)
        print(json.dumps([len(weights.tensors), weights.origin.pixels, weights.classes]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def ask(home, endpoint, *addresses, **more):
    """Returns what a process reads from addresses: tensors, pixels, classes, or errors."""
    values = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **more}
    done = subprocess.run(
        [sys.executable, "-c", _ASK, *addresses],
        env={**os.environ, **values},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()[-len(addresses) :]]


def repository(server, name, files):
    for file, content in files.items():
        server.files[f"/{name}/resolve/main/{file}"] = content


CONFIG = {
    "architecture": "resnet18",
    "label_names": ["cat", "dog"],
    "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5]},
}
PIXELS = {"format": "RGB", "mean": [127.5] * 3, "std": [127.5, 63.75, 127.5]}


@pytest.mark.long
def test_the_hub(server, tmp_path):
    """Safetensors are fetched first, only once, and later without the hub; names select a file."""
    state = {k: v.contiguous() for k, v in timm.create_model("resnet18").state_dict().items()}
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.bin")
    binary = (tmp_path / "w.bin").read_bytes()
    files = {"model.safetensors": save_safetensors(state), "pytorch_model.bin": binary}
    repository(server, "me/net", {**files, "config.json": json.dumps(CONFIG).encode()})
    repository(server, "me/old", {"pytorch_model.bin": binary, "sub/x.pth": binary})
    home, net = tmp_path / "home", [len(state), PIXELS, ["cat", "dog"]]
    addresses = [f"hf://me/{name}" for name in ("net", "old", "old/sub/x.pth", "old/y.pth")]
    *found, absent = ask(home, server.url, *addresses)
    assert found == [net, [1, {}, None], [1, {}, None]]
    assert "no such file" in absent
    assert not any(path.endswith("net/resolve/main/pytorch_model.bin") for path in server.sent)
    sent = len(server.sent)
    addresses = ["hf://me/net", "hf://me/other"]
    found, absent = ask(home, server.url, *addresses, HF_HUB_OFFLINE="1")
    assert found == net and "HF_HUB_OFFLINE is 1" in absent
    found, absent = ask(home, "http://127.0.0.1:9", *addresses)
    assert found == net and "does not respond" in absent
    assert len(server.sent) == sent
    asked = len(server.asked)  # no requests for cached or known missing files
    found = ask(home, server.url, "hf://me/net", "hf://me/old", "hf://me/old/sub/x.pth")
    assert found == [net, [1, {}, None], [1, {}, None]] and len(server.asked) == asked


@pytest.mark.slow
def test_weights_that_timm_knows(server, tmp_path):
    """timm's config has the pixel statistics; a detector loads the translated weights."""
    state = {k: v.contiguous() for k, v in timm.create_model("resnet18").state_dict().items()}
    repository(server, "timm/resnet18.tv_in1k", {"model.safetensors": save_safetensors(state)})
    home = tmp_path / "home"
    (found,) = ask(home, server.url, "timm://resnet18.tv_in1k")
    assert found[0] == len(state)
    assert found[1]["mean"] == [123.675, 116.28, 103.53]
    program = """
import sys, torch
from contnet.checkpoint.checkpointer import Checkpointer
from contnet.checkpoint.metadata import describe_model
from contnet.config import load_config
from contnet.modeling.build import build_model
cfg = load_config(sys.argv[1], sys.argv[2:])
made = Checkpointer(build_model(cfg), metadata=describe_model(cfg, None))
made.load_backbone("timm://resnet18.tv_in1k")
print(made.model.backbone.bottom_up.stem.conv1.weight.sum().item())
print(*made.warnings)
"""
    leaf = str(REPOSITORY / "configs" / "faster_rcnn_r50.yaml")
    options = [*SMALL, "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    done = subprocess.run(
        [sys.executable, "-c", program, leaf, *options, "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    total, warning = done.stdout.splitlines()
    assert float(total) == pytest.approx(state["conv1.weight"].sum().item(), rel=1e-4)
    assert 'MODEL.PIXEL_STD "[58.395, 57.12, 57.375]"' in warning


NAMES = {
    "timm://resnet51": "the nearest is resnet5",
    "timm://resnet50.mine": "resnet50.tv_in1k",
    "timm://contnet_m": "it has no published weights",
    "hf://resnet50": "hf://OWNER/REPOSITORY",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_there_are_not(name):
    with pytest.raises(UserError) as error:
        fetch_weights(name)
    assert name in str(error.value) and NAMES[name] in str(error.value)


# --- a run ---------------------------------------------------------------------------------------


def test_a_run_fetches_before_it_does_anything_else(tmp_path, capsys):
    """The run fetches before it reads the data, which do not exist here."""
    from contnet.launch.main import main

    leaf = str(REPOSITORY / "configs" / "imagenet" / "contti.yaml")
    options = [*QUICK, "MODEL.WEIGHTS", "http://127.0.0.1:9/w.pth", "OUTPUT_DIR", str(tmp_path)]
    assert main(["--config-file", leaf, *options]) == 1
    assert "cannot be downloaded (Connection refused)" in capsys.readouterr().err.splitlines()[-1]


def test_a_conversion_takes_an_address(server, tmp_path, capsys):
    from contnet.commands.convert_weights import main

    state = {k: v.contiguous() for k, v in timm.create_model("resnet18").state_dict().items()}
    server.files["/r18.safetensors"] = save_safetensors(state)
    assert main([f"{server.url}/r18.safetensors", str(tmp_path / "r18.pth")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(str(tmp_path / "r18-"))


CONFIGS_OF_STRANGERS = {
    "texts": b'{"mean": ["a", "b", "c"], "std": ["a", "b", "c"]}',
    "numbers": b'{"mean": 3, "std": 4, "label_names": 5}',
    "deep": b"[" * 100_000,
    "a list": b"[1]",
    "no text": b"\xff\xfe",
}


@pytest.mark.slow
def test_a_config_of_a_stranger_is_left_out(server, tmp_path):
    for number, config in enumerate(CONFIGS_OF_STRANGERS.values()):
        files = {"model.safetensors": payload(), "config.json": config}
        repository(server, f"me/net{number}", files)
    addresses = [f"hf://me/net{number}" for number in range(len(CONFIGS_OF_STRANGERS))]
    assert ask(tmp_path / "home", server.url, *addresses) == [[1, {}, None]] * len(addresses)


def test_a_digest_of_the_address_goes_before_one_in_the_name(server):
    server.files["/net-abcdef12.pth"] = payload()
    right = hashlib.sha256(payload()).hexdigest()
    assert read_weights(f"{server.url}/net-abcdef12.pth#sha256={right}").sha256 == right
    with pytest.raises(UserError, match="another file"):
        read_weights(f"{server.url}/net-abcdef12.pth")


@pytest.mark.parametrize("name", ["step-00012345", "模型", "b7a1f0de-11aa-4bcd-9e11-0123456789ab"])
def test_names_that_have_no_digest(server, tmp_path, name):
    server.files[quote(f"/{name}.pth")] = payload()
    (tmp_path / f"{name}.pth").write_bytes(payload())
    for source in (f"{server.url}/{name}.pth", str(tmp_path / f"{name}.pth")):
        assert list(read_weights(source).tensors) == ["weight"]


@pytest.mark.parametrize("source", ["a" * 300, "a\0b", "http://[::1/x.pth", "http://h/\udc80.pth"])
def test_what_no_file_and_no_address_can_be_is_one_line(source):
    with pytest.raises(UserError):
        read_weights(source)
