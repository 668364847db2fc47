"""Damaged files: cut by a kill, zeroed by a lost node, or overwritten."""

from pathlib import Path

__all__ = ["DAMAGES", "damage"]

# None stands for a folder with that name.
DAMAGES: dict[str, bytes | None] = {
    "empty": b"",
    "cut": b"[{",
    "zeros": bytes(64),
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[3]",
    "a number": b"3",
    "no keys": b"[{}]",
    "other types": b'{"iteration": "x", "time": NaN, "rank": [], "job_id": "../..", "pid": 1e99}',
    "nested": b"[" * 100_000,
    "a folder": None,
}


def damage(file: Path, content: bytes | None) -> None:
    """Replaces a file with damaged content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.mkdir() if content is None else file.write_bytes(content)
