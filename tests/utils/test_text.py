"""Tests how foreign text is printed."""

import io
import logging
import sys

import pytest

from contnet.utils.errors import UserError, print_error
from contnet.utils.logs import SafeFormatter, protect_handler, protect_streams
from contnet.utils.text import printable, say

# A name that clears the screen, forges a line, reverses the text and is not valid UTF-8.
HOSTILE = "cat\x1b[2J\x1b[31m\r\n[11/29 error]: gone\u202egpj\u2028\x9b\ud800"


ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"


def is_harmless(text: str) -> bool:
    return text.isprintable() and text.encode() is not None


def test_what_cannot_be_seen_is_escaped_once():
    shown = printable(HOSTILE)
    assert is_harmless(shown) and printable(shown) == shown
    assert r"\x1b[2J" in shown and r"\r\n" in shown and r"\u202e" in shown and r"\ud800" in shown


@pytest.mark.parametrize("name", ["Strauß", "猫", "می‌خواهم", "क्‍ष", "👩‍👩‍👧", "a b", ENGLAND])
def test_words_of_all_languages_stay(name):
    assert printable(name) == name


def test_names_of_megabytes_are_cut():
    assert len(printable("\x1b" * 10**7)) < 10**4
    assert "10000000" in printable("x" * 10**7)


def test_an_error_is_one_line(capsys):
    for message in (HOSTILE, "a\nb\r\nc\u2028d", "x" * 10**7):
        print_error(UserError(message))
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.endswith("\n") and len(line) < 10**4
        assert is_harmless(line[:-1])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_terminal_refuses_a_name(encoding, monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    say("class 猫 \x1b[2J \ud800", "next")
    protect_streams()
    print("猫 \ud800")
    logging.Logger("early").warning("%s", "猫 \x1b[2J\ud800")  # no handler exists
    written = {}
    for name, stream in streams.items():
        stream.flush()
        written[name] = stream.buffer.getvalue()
        assert b"\x1b" not in written[name] and b"Traceback" not in written[name]
    lines = written["stdout"].splitlines()
    assert len(lines) == 3 and lines[1] == b"next"
    assert len(written["stderr"].splitlines()) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_log_keeps_lines_and_colours_of_its_own_alone(terminal):
    """The colour of a log's prefix goes only to terminals; no other text controls them."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream.isatty = lambda: terminal
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("\x1b[32m[now]\x1b[0m %(message)s"))
    protect_handler(handler)
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.warning("%s has no image", "a.jpg\n[11/29 10:00:00 error]: all is lost")
    logger.info("table of %s\n\tone\ttwo", "\x1b[36m猫\x1b[0m \x1b]0;title\x07 \ud800\r")
    try:
        raise ValueError("in \x1b[2J a name")
    except ValueError:
        logger.exception("it failed")
    stream.flush()
    lines = stream.buffer.getvalue().decode("ascii").split("\n")
    prefix = "\x1b[32m[now]\x1b[0m" if terminal else "[now]"
    assert lines.pop(0) == rf"{prefix} a.jpg\n[11/29 10:00:00 error]: all is lost has no image"
    assert lines[0] == rf"{prefix} table of \u732b \x1b]0;title\x07 \ud800\r"
    assert lines[1] == "\tone\ttwo"
    rest = "\n".join(lines[1:]).replace(prefix, "")
    assert "\x1b" not in rest and r"ValueError: in \x1b[2J a name" in rest


def test_say_prints_a_line_for_each_argument(capsys):
    say("a | b", "1 |\t2", "x\ny")
    assert capsys.readouterr().out == "a | b\n1 |\t2\nx\\ny\n"


def test_the_formatter_leaves_records_as_they_are():
    """Other handlers format the same record."""
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s\x07", ("y",), None)
    SafeFormatter(logging.Formatter()).format(record)
    assert record.getMessage() == "y\x07"
