"""Unpickles weights safely: only functions that are allowed here are ever called.

Tensors, plain values and numpy arrays of numbers and strings are built. The arrays are built here,
not by numpy, which trusts a pickle's data about an array's memory. An object of any other class
becomes a dict or list with its items, and its class is not imported.
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

# Modules and built-in functions that weights can only contain in order to run code.
_CODE = {
    *("ctypes", "importlib", "nt", "os", "posix", "pty", "runpy", "shutil", "socket", "subprocess"),
    *("sys", "builtins.__import__", "builtins.breakpoint", "builtins.compile", "builtins.eval"),
    *("builtins.exec", "builtins.input", "builtins.open"),
}
_DEEPEST = 200
# Type codes of numpy's numbers and strings.
_PLAIN_TYPE = re.compile(r"[<>=|]?(?:[?bhilqBHILQefdFD]|[biufcSU]\d{1,9})")


class RunsCode(pickle.UnpicklingError):
    """Raised if a pickle would run code."""


class _Fixed(type):
    """Metaclass of classes whose attributes a pickle cannot set."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"it sets {printable(name, 100)} of a class")


# --- numpy's arrays ------------------------------------------------------------------------------


class _Type(metaclass=_Fixed):
    """Replaces ``numpy.dtype``."""

    def __init__(self, code: str, *_: object):
        self.code, self.order = code, ""

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def plain(self) -> np.dtype | None:
        """The numpy dtype; None for object types and others that are not supported."""
        code = f"{self.order}{self.code}"
        return np.dtype(code) if _PLAIN_TYPE.fullmatch(code) else None


def _as_bytes(data: object) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))


class _Array(np.ndarray, metaclass=_Fixed):
    """Replaces ``numpy.ndarray``; an array of objects stays empty."""

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
    """Builds an array of a pickle with protocol 5 or later."""

    def __new__(cls, data: object, kind: _Type, shape: tuple, order: str):
        array = _Array()
        array.__setstate__((1, shape, kind, order == "F", data))
        return array


class _Scalar(metaclass=_Fixed):
    """Builds a numpy scalar."""

    def __new__(cls, kind: _Type, data: object = b""):
        dtype = kind.plain()
        return OrderedDict() if dtype is None else np.frombuffer(_as_bytes(data), dtype, 1)[0]


class _Encode(metaclass=_Fixed):
    """Builds the bytes of a pickle with a protocol before 3."""

    def __new__(cls, text: str, encoding: str):
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it contains bytes as {printable(str(encoding), 100)}")
        return text.encode("latin1")


# Replacements for numpy's objects, by the names in numpy 1 and 2.
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
    if module != "exceptions":  # a Python 2 module that PyTorch does not rename
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    full = f"{module}.{name}"
    if full in _CODE or full.partition(".")[0] in _CODE:
        raise RunsCode(full)
    return full


class _Finder(pickle.Unpickler):
    """Finds a pickle's classes and functions, and their kinds, without building objects."""

    def __init__(self, file: BinaryIO, found: dict[str, type | None]):
        super().__init__(file, encoding="latin1")
        self.found = found

    def persistent_load(self, _: object) -> None:
        """Ignores the values of a tensor, which are stored elsewhere in the file."""

    def find_class(self, module: str, name: str) -> type:
        found, full = self.found, _full_name(module, name)
        found.setdefault(full, OrderedDict)

        class Object(metaclass=_Fixed):
            def __new__(cls, *args: object, **kwargs: object):
                return super().__new__(cls)

            def __call__(self, *args: object) -> object:
                return self  # for functions that return functions

            def __setitem__(self, key: object, value: object) -> None:
                """Ignores an item, since objects are dicts unless shown otherwise."""

            def extend(self, values: list) -> None:
                found[full] = list

            append = extend

            def __setstate__(self, state: object) -> None:
                if not isinstance(state, dict):  # e.g. of a class with __slots__
                    found[full] = None

        return Object


def find_kinds(file: BinaryIO, pickles: int = 1) -> dict[str, type | None]:
    """Returns the kind of objects for each class or function in pickles, by full name.

    PyTorch adds items only to Python's own dicts and lists, and accepts only a dict as the state of
    a dict.

    Args:
        file: open file, at the first pickle.
        pickles: number of consecutive pickles.

    Raises:
        RunsCode: if a pickle would run code.
        Exception: of any kind if a pickle is damaged, or the file is not a pickle.
    """
    start = file.tell()
    size = file.seek(0, 2)
    file.seek(start)
    for kind, argument, _ in (each for _ in range(pickles) for each in pickletools.genops(file)):
        # Python would allocate memory for all memo numbers up to this one.
        if kind.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > size:
            raise pickle.UnpicklingError(f"it numbers an object {argument}")
    file.seek(start)
    found: dict[str, type | None] = {}
    for _ in range(pickles):
        _Finder(file, found).load()
    return found


def make_stand_in(name: str, kind: type | None, left_out: set[str]) -> type:
    """Creates a class that replaces another one.

    Args:
        name: name of the other class.
        kind: class of the objects, which are created empty: a dict, a list, or None for neither.
        left_out: set to which the name is added when an object is created.
    """

    class StandIn(metaclass=_Fixed):
        def __new__(cls, *args: object, **kwargs: object):
            left_out.add(name)
            return kind() if kind else super().__new__(cls)

        def __setstate__(self, state: object) -> None:
            """Ignores the state."""

    return StandIn


def without_attributes(content: object) -> object:
    """Removes attributes that a pickle has set on its dicts, which could hide methods.

    Raises:
        pickle.UnpicklingError: if the content is nested too deeply.
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
    """Reads a pickle that was not written by torch.save.

    Args:
        file: open file, at its beginning.
        left_out: set to which the names of classes are added whose objects are dropped.

    Raises:
        RunsCode: if the pickle would run code.
        Exception: of any kind if it is damaged, or not a pickle.
    """
    kinds = find_kinds(file)
    file.seek(0)
    return _Unpickler(file, kinds, left_out).load()
