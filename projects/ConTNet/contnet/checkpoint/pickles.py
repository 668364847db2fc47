"""What a pickle of weights may be made of, which is all that reading one ever calls.

Tensors, plain values and numpy's arrays of numbers and texts are built; the latter here and not by
numpy, which trusts what a pickle says of an array's memory. An object of any other class becomes an
empty dict with the items that it has as a dict, or a list, and its class is not imported.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from typing import BinaryIO

import numpy as np

from contnet.utils.text import printable

__all__ = ["NUMPY", "RunsCode", "find_kinds", "load_pickle", "make_stand_in", "without_attributes"]

# What has no place in weights but to run code: modules, and functions of Python's own.
_CODE = {
    *("ctypes", "importlib", "nt", "os", "posix", "pty", "runpy", "shutil", "socket", "subprocess"),
    *("sys", "builtins.__import__", "builtins.breakpoint", "builtins.compile", "builtins.eval"),
    *("builtins.exec", "builtins.input", "builtins.open"),
}
_DEEPEST = 200
# Codes of numpy's types of numbers and texts.
_PLAIN_TYPE = re.compile(r"[<>=|]?(?:[?bhilqBHILQefdFD]|[biufcSU]\d{1,9})")


class RunsCode(pickle.UnpicklingError):
    """The pickle asks for what runs code."""


class _Fixed(type):
    """Classes that a pickle, which may set attributes of what it names, cannot change."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"it sets {printable(name, 100)} of a class")


# --- numpy's arrays ------------------------------------------------------------------------------


class _Type(metaclass=_Fixed):
    """A dtype."""

    def __init__(self, code: str, *_: object):
        self.code, self.order = code, ""

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def plain(self) -> np.dtype | None:
        """numpy's own; None for types of objects, and others that have no place here."""
        code = f"{self.order}{self.code}"
        return np.dtype(code) if _PLAIN_TYPE.fullmatch(code) else None


def _as_bytes(data: object) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))


class _Array(np.ndarray, metaclass=_Fixed):
    """An array; one of objects stays empty."""

    def __new__(cls, *_: object):
        return super().__new__(cls, 0, "S1")

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        if (dtype := kind.plain()) is None:
            return
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise pickle.UnpicklingError("it contains an array without a shape")
        super().__setstate__((1, tuple(shape), dtype, bool(fortran), _as_bytes(data)))


class _Buffer(metaclass=_Fixed):
    """An array as pickles have it since protocol 5."""

    def __new__(cls, data: object, kind: _Type, shape: tuple, order: str):
        array = _Array()
        array.__setstate__((1, shape, kind, order == "F", data))
        return array


class _Scalar(metaclass=_Fixed):
    """One number."""

    def __new__(cls, kind: _Type, data: object = b""):
        dtype = kind.plain()
        return OrderedDict() if dtype is None else np.frombuffer(_as_bytes(data), dtype, 1)[0]


class _Encode(metaclass=_Fixed):
    """Bytes as pickles had them before protocol 3."""

    def __new__(cls, text: str, encoding: str):
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it contains bytes as {printable(str(encoding), 100)}")
        return text.encode("latin1")


# By the names of numpy 1 and 2.
NUMPY = {
    "numpy.dtype": _Type,
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _Scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _Buffer for core in ("core", "_core")},
}
_PLAIN = {
    **NUMPY,
    "_codecs.encode": _Encode,
    "builtins.complex": complex,
    "builtins.frozenset": frozenset,
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
}


# --- objects of other classes --------------------------------------------------------------------


def _full_name(module: str, name: str) -> str:
    if module != "exceptions":  # the one that PyTorch does not translate from Python 2
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    full = f"{module}.{name}"
    if full in _CODE or full.partition(".")[0] in _CODE:
        raise RunsCode(full)
    return full


class _Finder(pickle.Unpickler):
    """Finds what a pickle asks for and does with it, and builds nothing of it."""

    def __init__(self, file: BinaryIO, found: dict[str, type | None]):
        super().__init__(file, encoding="latin1")
        self.found = found

    def persistent_load(self, _: object) -> None:
        """The values of a tensor, which are elsewhere in the file."""

    def find_class(self, module: str, name: str) -> type:
        found, full = self.found, _full_name(module, name)
        found.setdefault(full, OrderedDict)

        class Object(metaclass=_Fixed):
            def __new__(cls, *args: object, **kwargs: object):
                return super().__new__(cls)

            def __call__(self, *args: object) -> object:
                return self  # as of functions that return functions

            def __setitem__(self, key: object, value: object) -> None:
                """A dict's, which is what it is taken for anyway."""

            def extend(self, values: list) -> None:
                found[full] = list

            append = extend

            def __setstate__(self, state: object) -> None:
                if not isinstance(state, dict):  # as of classes with __slots__
                    found[full] = None

        return Object


def find_kinds(file: BinaryIO, pickles: int = 1) -> dict[str, type | None]:
    """What pickles ask for, by name, and the kind of each one's objects.

    PyTorch puts items into dicts and lists of Python's own alone, and sets no state of a dict that
    is none itself.

    Args:
        file: open, at the first of them.
        pickles: how many there are, one behind the other.

    Raises:
        RunsCode: if one of them is there to run code.
        Exception: of any kind for what is no pickle, or a damaged one.
    """
    start = file.tell()
    size = file.seek(0, 2)
    file.seek(start)
    for kind, argument, _ in (each for _ in range(pickles) for each in pickletools.genops(file)):
        # Python would take memory for all numbers up to it.
        if kind.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > size:
            raise pickle.UnpicklingError(f"it numbers an object {argument}")
    file.seek(start)
    found: dict[str, type | None] = {}
    for _ in range(pickles):
        _Finder(file, found).load()
    return found


def make_stand_in(name: str, kind: type | None, left_out: set[str]) -> type:
    """A class that stands for another one.

    Args:
        name: of the other one.
        kind: what its objects are, empty at first: dicts, lists, or None for objects without
            anything.
        left_out: takes the name once there is such an object.
    """

    class StandIn(metaclass=_Fixed):
        def __new__(cls, *args: object, **kwargs: object):
            left_out.add(name)
            return kind() if kind else super().__new__(cls)

        def __setstate__(self, state: object) -> None:
            """Takes nothing."""

    return StandIn


def without_attributes(content: object) -> object:
    """Takes away what a pickle has set of its dicts beside their items, and so may hide methods.

    Raises:
        pickle.UnpicklingError: if it is nested deeper than Python can follow.
    """
    seen, left = set(), [(content, 0)]
    while left:
        each, depth = left.pop()
        if id(each) in seen or not isinstance(each, dict | list | tuple):
            continue
        if depth > _DEEPEST:
            raise pickle.UnpicklingError(f"it is nested more than {_DEEPEST} levels deep")
        seen.add(id(each))
        if isinstance(each, dict):
            getattr(each, "__dict__", {}).clear()
        values = dict.values(each) if isinstance(each, dict) else each
        left.extend((value, depth + 1) for value in values)
    return content


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, kinds: dict[str, type | None], left_out: set[str]):
        super().__init__(file, encoding="latin1")
        self.kinds, self.left_out = kinds, left_out

    def find_class(self, module: str, name: str) -> object:
        full = _full_name(module, name)
        return _PLAIN.get(full) or make_stand_in(full, self.kinds[full], self.left_out)


def load_pickle(file: BinaryIO, left_out: set[str]) -> object:
    """Reads a pickle that torch.save has not written.

    Args:
        file: open, at its beginning.
        left_out: takes the names of classes whose objects are left out.

    Raises:
        RunsCode: if it asks for what runs code.
        Exception: of any kind for what is no pickle, or a damaged one.
    """
    kinds = find_kinds(file)
    file.seek(0)
    return _Unpickler(file, kinds, left_out).load()
