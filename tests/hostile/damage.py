"""Damages files at random with hypothesis, and checks how commands handle them.

By default, few and always the same examples are drawn; ``HYPOTHESIS_PROFILE=soak`` draws many,
seeded by ``--hypothesis-seed``.
"""

import contextlib
import copy
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterator

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from contnet.utils.errors import UserError, print_error

__all__ = ["JUNK", "changed", "damaged", "damaged_json", "each_nested", "outcome", "run_command"]

# Files are written and models are looked up, so examples have no time limit.
_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("quick", max_examples=40, derandomize=True, **_COMMON)
settings.register_profile("soak", max_examples=1000, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# Categories of characters that must not be printed to a terminal.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Values of wrong types or ranges.
JUNK = st.sampled_from(
    [
        *(None, True, -1, 0, 0.5, 1e300, 2**63, -(10**30), float("nan"), float("inf")),
        *(
            "",
            "x",
            "1",
            "nan",
            "../../x",
            "/dev/zero",
            "a\nb",
            "\x1b[31m",
            "\u202e",
            "\ud800",
            "\0",
        ),
        *([], {}, [[]], [None], {"x": {}}, [1, "a"], "y" * 5000),
    ]
).map(copy.deepcopy)  # drawn values are changed further
# Files that often break parsers.
_ODD = (
    *(b"", b"\0" * 100, b"null", b"[]", b"{}", b"3", b'"x"', b"[3]", b"[{}]", b"\xff\xfe", b"NaN"),
    *(b"[" * 100_000, b"1" * 5000, b'{"a": ' * 2000, b'{"time": 1e999}', b"\xef\xbb\xbf{}"),
)


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Bytes with one change: flipped, cut, zeroed, added or repeated."""
    place = draw(st.integers(0, max(len(data) - 1, 0)))
    length = draw(st.sampled_from([1, 4, 100, 4096]))
    head, middle, tail = data[:place], data[place : place + length], data[place + length :]
    how = draw(st.sampled_from(["flip", "cut", "zeros", "add", "repeat", "leave out"]))
    if how == "flip" and data:
        bit = draw(st.integers(0, 7))
        return head + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
    middles = {
        "zeros": bytes(len(middle)),
        "add": draw(st.binary(min_size=1, max_size=20)) + middle,
        "repeat": 2 * middle,
        "leave out": b"",
    }
    return head if how == "cut" else head + middles.get(how, middle) + tail


def _places(value: object) -> Iterator[tuple[object, object]]:
    """Yields every container in a value, with each of its keys or positions."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@st.composite
def changed(draw, value: object) -> object:
    """A JSON value in which one to three places are changed or removed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return draw(JUNK)
        container, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["junk", "junk", "leave out", "repeat", "nest"]))
        if how == "junk":
            container[key] = draw(JUNK)
        elif how == "leave out":
            del container[key]
        elif how == "nest":
            container[key] = [container[key]]
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[f"{key}2"] = copy.deepcopy(container[key])
    return value


def each_nested(value: object) -> Iterator[object]:
    """Yields the value once for each place in it, with that place put in a list."""
    for number in range(len(list(_places(value)))):
        other = copy.deepcopy(value)
        container, key = list(_places(other))[number]
        container[key] = [container[key]]
        yield other


def damaged_json(data: bytes) -> st.SearchStrategy[bytes]:
    """A file of JSON, or of JSON lines, whose bytes or values are damaged."""
    lines = [json.loads(data)] if data.strip()[:1] == b"[" else None
    if lines is None:
        lines = [json.loads(line) for line in data.splitlines()] if b"}\n{" in data else None
    values = lines if lines is not None else [json.loads(data)]
    said = changed(values).map(
        lambda each: "\n".join(map(json.dumps, each if isinstance(each, list) else [each])).encode()
    )
    return st.one_of(damaged(data), said, st.sampled_from(_ODD))


def _is_one_line(text: str) -> bool:
    lines = text.splitlines()
    seen = all(unicodedata.category(char) not in _UNSEEN for char in lines[0]) if lines else False
    return len(lines) == 1 and lines[0].startswith("error: ") and seen


def outcome(function: Callable[[], object]) -> tuple[object, str]:
    """Returns a function's result and "", or None and the one-line error for the user."""
    try:
        return function(), ""
    except UserError as error:
        with contextlib.redirect_stderr(io.StringIO()) as stream:
            print_error(error)
        assert _is_one_line(stream.getvalue()), repr(stream.getvalue()[:2000])
        return None, stream.getvalue()


def run_command(main: Callable[[list[str]], int], *argv: str) -> tuple[int, str]:
    """Returns the status of a command and its output; checks that errors are one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(argv))
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    assert len(errors) <= 1 and "Traceback" not in err.getvalue(), err.getvalue()[-3000:]
    return status, out.getvalue() + err.getvalue()
