"""Tests malicious pickles, archives and headers, and harmless ones that only look unusual."""

import argparse
import collections
import dataclasses
import fractions
import functools
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg

from contnet.checkpoint.reading import read_checkpoint, read_weights
from contnet.utils.errors import UserError


class Reduce:
    """Pickles as a call of any function, with a state that is set on the result."""

    def __init__(self, *parts):
        self.parts = parts


class Named:
    """A name in a pickle, of a module that need not exist."""

    def __init__(self, name):
        self.name = name


class Stored:
    """The values of a tensor, which are not in its pickle."""


class Pickler(pickle._Pickler):
    """Python's pickler implemented in Python, which writes ``Named`` and ``Stored``."""

    def __init__(self, file, protocol, view=()):
        super().__init__(file, protocol)
        self.view = view

    def persistent_id(self, obj):
        if isinstance(obj, Stored):
            return ("storage", Named("torch FloatStorage"), "0", "cpu", 4, *self.view)
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(b"c" + obj.name.replace(" ", "\n").encode() + b"\n")
        elif isinstance(obj, Reduce):
            function, args, *state = obj.parts
            self.save(function)
            self.save(args)
            self.write(b"R")
            for each in state:
                self.save(each)
                self.write(b"b")
        else:
            super().save(obj, save_persistent_id)


def dump(content, protocol=2, view=()):
    file = io.BytesIO()
    Pickler(file, protocol, view).dump(content)
    return file.getvalue()


def call(name, *args, state=None):
    return Reduce(Named(name), args, *(() if state is None else (state,)))


TENSOR = call(
    "torch._utils _rebuild_tensor_v2",
    Stored(),
    *(0, (4,), (1,), False, call("collections OrderedDict")),
)


def as_archive(data=None, compress=zipfile.ZIP_STORED, **members):
    """Returns torch.save's archive of ``{"w": torch.ones(4)}``, with other members."""
    whole, made = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.ones(4)}, whole)
    members = {"data.pkl": data, **members} if data else members
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(made, "w", compress) as target:
        for name in source.namelist():
            target.writestr(name, members.get(Path(name).name, source.read(name)))
    return made.getvalue()


def as_legacy(content):
    """Returns the format of torch.save before PyTorch 1.6."""
    made = io.BytesIO()
    torch.save({"w": torch.ones(4)}, made, _use_new_zipfile_serialization=False)
    start, _, rest = made.getvalue().rpartition(b"\x80\x02}q\x00X\x01\x00\x00\x00w")
    keys = rest[rest.index(b"\x80\x02]") :]
    key = pickle.loads(keys)[0].encode()
    return (
        start
        + dump(content, view=(None,))
        + keys.replace(key, b"0").replace(bytes([len(key)]) + b"\0\0\0", b"\x01\0\0\0", 1)
    )


def arrays(code, flags, shape=(2,), data=b"A" * 16):
    """Returns an array whose type is not the declared one."""
    kind = call("numpy dtype", code, False, True, state=(3, "<", None, None, None, -1, -1, flags))
    make = "numpy.core.multiarray _reconstruct"
    state = (1, shape, kind, False, data)
    return call(make, Named("numpy ndarray"), (0,), b"b", state=state)


TOUCH = "import pathlib; pathlib.Path('ran').touch()"
# Each is stored beside a tensor; "ran" is the file that it would create if it ran.
NASTY = {
    "os.system": call("os system", "touch ran"),
    "posix.system": call("posix system", "touch ran"),
    "subprocess": call("subprocess check_call", ["touch", "ran"]),
    "eval": call("builtins eval", "open('ran', 'w')"),
    "exec": call("builtins exec", TOUCH),
    "exec of Python 2": call("__builtin__ exec", TOUCH),
    "__import__": call("builtins __import__", "antigravity"),
    "importlib": call("importlib import_module", "antigravity"),
    "runpy": call("runpy run_path", "evil.py"),
    "getattr of a module": call("builtins getattr", Named("os path"), "os"),
    "a bytearray of 100 GB": call("builtins bytearray", 10**11),
    "a scalar at an address": call(
        "numpy.core.multiarray scalar",
        call("numpy dtype", "O", False, True, state=(3, "|", None, None, None, -1, -1, 0)),
        b"A" * 8,
    ),
    "an array of addresses": arrays("O", 0),
    "numbers as references": arrays("f8", 63, data=[1.0, 2.0]),
    "an array of terabytes": arrays("f8", 0, shape=(10**12,)),
    "an array of no shape": arrays("f8", 0, shape=(-1, -2)),
    "a structure": arrays("V8", 0),
    "numpy's loader": call("numpy.core.multiarray _reconstruct", Named("os system"), (0,), b"b"),
    "numpy from a file": call("numpy load", "evil.npy", None, True),
    "partial": call("functools partial", Named("os system"), "touch ran"),
    "attrgetter": call("operator attrgetter", "__class__.__subclasses__"),
    "methodcaller": call("operator methodcaller", "touch"),
    "copyreg": call(
        "copyreg _reconstructor", Named("pathlib Path"), Named("builtins object"), None
    ),
    "copy_reg": call("copy_reg _reconstructor", Named("a.b C"), Named("__builtin__ object"), None),
    "a loader": call("torch load", "evil.pth"),
    "a hub": call("torch.hub load", "evil/evil", "evil"),
    "jit": call("torch.jit load", "evil.pt"),
    "code": call("types CodeType", 0, 0, 0),
    "nested": call("a B", call("c D", call("e F", {"g": call("h I")}), state={"j": call("k L")})),
    "attributes that are methods": call("argparse Namespace", state={"items": 1, "get": 2}),
    "an ordered dict's": call("collections OrderedDict", state={"items": 1, "values": 2}),
    "an attribute of a class": Reduce(Named("a B"), (), {"__class__": 1}),
    "a codec": call("_codecs encode", "x" * 10, "punycode"),
    "tensors from numpy": call(
        "torch._utils _rebuild_device_tensor_from_numpy", None, Named("torch float32"), "cpu", False
    ),
    "a call by torch": call("torch._tensor _rebuild_from_type_v2", Named("os system"), 1, (), {}),
    "another call by torch": call(
        "torch._tensor _rebuild_from_type_v2",
        Named("a system"),
        Named("torch Tensor"),
        ("touch ran",),
        {"__class__": 1},
    ),
    "tensors of no storage": call(
        "torch._utils _rebuild_meta_tensor_no_storage",
        Named("torch float32"),
        (10**9,) * 2,
        (1,) * 2,
        0,
    ),
    "a tensor of 4 TB": call("torch FloatTensor", 10**12),
}
# Those whose error message says that the file would run code.
CODE = ("os.system", "posix.system", "subprocess", "eval", "exec", "exec of Python 2")
CODE += ("__import__", "importlib", "runpy", "getattr of a module", "numpy's loader", "partial")
CODE += ("a call by torch",)
# Harmless objects, which are left out.
INERT = ("attrgetter", "methodcaller", "copyreg", "copy_reg", "a loader", "a hub", "jit", "code")
INERT += ("nested", "attributes that are methods", "numpy from a file", "a structure")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "ran").exists()


def read(data, name="w.pth"):
    """Reads with both readers, which must agree; returns weights by name, or the error line."""
    Path(name).write_bytes(data)
    try:
        weights = read_weights(name)
    except UserError as error:
        with pytest.raises(UserError):
            read_checkpoint(name)
            raise error  # a file without tensors is still a checkpoint
        assert "\n" not in str(error) and "weights_only" not in str(error)
        assert len(str(error)) < 1000
        return str(error)
    assert read_checkpoint(name).keys() >= {"model"}
    return weights


FORMS = {
    "pth": lambda content: as_archive(dump(content)),
    "legacy": as_legacy,
    "pkl": dump,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", NASTY)
def test_nothing_in_a_pickle_runs(kind, form):
    weights = {"w": np.ones(4) if form == "pkl" else TENSOR}
    found = read(FORMS[form]({"model": weights, "beside": NASTY[kind]}), f"w.{form}")
    if kind in CODE:
        assert "it would run code" in found
    elif kind in INERT:
        assert torch.equal(found.tensors["w"].float(), torch.ones(4)), found


# --- objects of training scripts -----------------------------------------------------------------


class Config(dict):
    """A dict with attributes, like the configs of MMEngine and yacs."""

    def __init__(self, **items):
        super().__init__(**items)
        self.frozen = True


class History:
    def __init__(self):
        self.values, self.mean = np.arange(3.0), np.float64(1)


class Slots:
    """A class whose state is a tuple."""

    __slots__ = ("name", "sizes")


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """A class whose state is a list."""

    name: str = "x"
    sizes: tuple = (1, 2)


def slotted():
    made = Slots()
    made.name, made.sizes = "x", [1, 2]
    return {"slots": made, "frozen": [Frozen(), Frozen()]}


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_beside_the_tensors_are_left_out(legacy):
    content = {
        "state_dict": collections.OrderedDict(w=torch.ones(4)),
        "args": argparse.Namespace(lr=0.1, path=Path("x")),
        "cfg": get_cfg(),
        "meta": Config(a=Config(b=[1]), history=History(), third=fractions.Fraction(1, 3)),
        "counts": collections.defaultdict(list, a=[1]),
        "objects": np.array([fractions.Fraction(1, 3)]),
        "times": np.array(["2026-01-01"], "M8[D]"),
        "function": os.path.join,
        "range": range(3),
        "error": ValueError("x"),
        "norm": functools.partial(Path, "x"),
        "recent": collections.deque([1, 2], maxlen=5),
        **slotted(),
    }
    torch.save(content, "w.pth", _use_new_zipfile_serialization=not legacy)
    weights = read_weights("w.pth")
    assert torch.equal(weights.tensors["w"], torch.ones(4))
    assert not vars(weights.rest["args"])
    assert weights.rest["meta"]["a"]["b"] == [1]
    assert weights.rest["recent"] == [1, 2]
    assert read_checkpoint("w.pth")["meta"]["a"]["b"] == [1]


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_all_protocols(protocol):
    content = {"model": {"w": np.arange(6.0).reshape(2, 3)}, "__author__": "x", "n": np.int64(3)}
    content["args"] = argparse.Namespace(lr=0.1, norm=functools.partial(Path, "x"))
    content |= {"recent": collections.deque([1, 2])} | (slotted() if protocol >= 2 else {})
    Path("w.pkl").write_bytes(pickle.dumps(content, protocol))
    weights = read_weights("w.pkl")
    assert weights.tensors["w"].tolist() == [[0, 1, 2], [3, 4, 5]] and weights.rest["n"] == 3
    assert weights.rest["recent"] == [1, 2]


# --- files that take memory or time --------------------------------------------------------------

NUMBERS = dump({"w": TENSOR})
HUGE = NUMBERS.replace(b"K\x04", b"\x8a\x06" + (10**12).to_bytes(6, "little"))
EXPANDED = dump(
    {"w": call("torch._utils _rebuild_tensor_v2", Stored(), 0, (10**6, 10**6), (0, 0), False, {})}
)
DAMAGED = {
    "compressed": lambda: as_archive(compress=zipfile.ZIP_DEFLATED),
    "a bomb": lambda: as_archive(compress=zipfile.ZIP_DEFLATED, **{"0": bytes(2**24)}),
    "TorchScript": lambda: as_archive().replace(b"archive/byteorder", b"a/b/constants.pkl"),
    "a storage of terabytes": lambda: as_archive(HUGE),
    "a storage of another size": lambda: as_archive(
        NUMBERS.replace(b"K\x04", b"K\x09"), **{"0": bytes(16)}
    ),
    "strides that lead out": lambda: as_archive(NUMBERS.replace(b"K\x01\x85", b"K\x09\x85")),
    "an offset that leads out": lambda: as_archive(NUMBERS.replace(b"QK\x00", b"QK\x09")),
    "negative strides": lambda: as_archive(NUMBERS.replace(b"K\x01\x85", b"J\xff\xff\xff\xff\x85")),
    "values that are repeated": lambda: as_archive(EXPANDED),
    "no such storage": lambda: as_archive(NUMBERS.replace(b"\x01\0\0\x000", b"\x01\0\0\x009")),
    "deep": lambda: as_archive(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
    "deep beside the tensors": lambda: as_archive(
        NUMBERS[:-1] + b"X\x04\x00\x00\x00meta" + b"]" * 1000 + b"a" * 999 + b"s."
    ),
    "a deep pickle": lambda: b"\x80\x04" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "an object of a far number": lambda: b"\x80\x02}r\xff\xff\xff\x7f.",
    "a text of gigabytes": lambda: b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x",
    "a frame of gigabytes": lambda: b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"x",
    "no archive": lambda: b"PK\x03\x04" + bytes(100),
    "a header of gigabytes": lambda: (2**31).to_bytes(8, "little") + b"{}",
    "deep metadata": lambda: tensors_with({"contnet": "[" * 10**5 + "]" * 10**5}),
    "metadata that are no object": lambda: tensors_with({"contnet": "[1]"}),
    "a tensor of terabytes": lambda: tensors_with({}, shape=[2**40]),
    "a tensor that leads out": lambda: tensors_with({}, offsets=[0, 400]),
    "a negative shape": lambda: tensors_with({}, shape=[-4]),
}


def tensors_with(metadata, shape=(4,), offsets=(0, 16)):
    """Returns a .safetensors file."""
    tensor = {"dtype": "F32", "shape": list(shape), "data_offsets": list(offsets)}
    header = json.dumps({"__metadata__": metadata, "w": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(16)


@pytest.mark.parametrize("kind", DAMAGED)
def test_sizes_are_bounded_before_memory_is_taken(kind):
    assert isinstance(read(DAMAGED[kind]()), str)


def test_a_tar_of_old_is_refused():
    with tarfile.open("w.pth", "w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert isinstance(read(Path("w.pth").read_bytes()), str)


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a folder", "a socket"])
def test_what_is_no_file_is_refused_at_once(kind):
    make = {
        "a FIFO": lambda: os.mkfifo("w.pth"),
        "a device": lambda: os.symlink("/dev/zero", "w.pth"),
        "a folder": lambda: os.mkdir("w.pth"),
        "a socket": lambda: socket.socket(socket.AF_UNIX).bind("w.pth"),
    }
    make[kind]()
    for reader in (read_weights, read_checkpoint):
        with pytest.raises(UserError, match=r"w\.pth"):
            reader("w.pth")


# --- the process ---------------------------------------------------------------------------------

_PROGRAM = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from contnet.checkpoint.reading import read_checkpoint, read_weights
from contnet.utils.errors import UserError
for file in sys.argv[1:]:
    for read in (read_weights, read_checkpoint):
        before = len(opened)
        try:
            read(file)
        except UserError as error:
            print(error)
        print(opened[before:].count(file))
"""


@pytest.mark.parametrize("forced", ["NO_WEIGHTS_ONLY_LOAD", "WEIGHTS_ONLY_LOAD"])
def test_variables_of_pytorch_change_nothing_and_a_file_is_opened_once(forced):
    evil, good = dump({"model": call("builtins exec", TOUCH)}), as_archive()
    for suffix in ("pth", "pyth", "pkl", "bin", ""):
        Path(f"evil.{suffix}").write_bytes(evil if suffix == "pkl" else as_archive(evil))
        Path(f"good.{suffix}").write_bytes(good)
    files = [*map(str, Path().glob("evil.*")), *map(str, Path().glob("good.*"))]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *files],
        env={**os.environ, f"TORCH_FORCE_{forced}": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[1:20:2] + lines[20:] == ["2"] * 20  # Python's open, and the system's within it
    assert all("it would run code (builtins.exec)" in line for line in lines[:20:2])
