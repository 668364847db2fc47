"""Fetches weights that MODEL.WEIGHTS names by an address, into the caches of the libraries.

A file takes its name once it is whole. Later runs find it there, without a network.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

import timm
from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.utils.file_io import Detectron2Handler, OneDrivePathHandler, PathManager
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from iopath.common.download import download
from iopath.common.file_io import file_lock, get_cache_dir
from portalocker.exceptions import LockException
from timm.models import get_pretrained_cfg

from contnet.utils.errors import UserError
from contnet.utils.text import nearest

__all__ = ["Fetched", "fetch_weights"]

# A server that says nothing for so long, in seconds, is given up.
_TIMEOUT = 30
# Whose files Detectron2 keeps by their path alone.
_DETECTRON2_HOST = "dl.fbaipublicfiles.com"
# Of a repository of the hub, the first that it has.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_CONFIG = "config.json"
# Owner, name, revision and file of an address hf://...
_HUB_ADDRESS = re.compile(r"([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")
# Those of its library of HTTP among them.
_HUB_ERRORS = (*HfHubHTTPError.__bases__, EntryNotFoundError, HFValidationError, ValueError)


@dataclass(frozen=True)
class Fetched:
    """A file of weights on this machine.

    Attributes:
        path: of the file.
        maker: who says what its pixels are; "" if nobody does.
        pixels: "format", "mean" and "std" of the channels, in units of 0 to 255.
        classes: names of the classes, in order; None where nobody tells them.
    """

    path: str
    maker: str = ""
    pixels: dict[str, str | list[float]] = field(default_factory=dict)
    classes: list[str] | None = None


# --- addresses of files --------------------------------------------------------------------------


@contextlib.contextmanager
def _timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server says {error.code} {error.reason}"
    reason = getattr(error, "reason", error)
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return str(reason).splitlines()[0] if str(reason) else type(error).__name__


def _cannot(source: str, error: Exception, reason: str = "") -> UserError:
    """The one line of a failure."""
    advice = "where there is no network, give MODEL.WEIGHTS a file that was copied there"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        advice = "caches are where FVCORE_CACHE, HF_HOME and TORCH_HOME say"
    return UserError(f"{source} cannot be fetched ({reason or _reason(error)}): {advice}")


def _cached_file(url: str) -> Path:
    """Where a URL's file is kept: in iopath's cache, below the name of its server."""
    parts = urlsplit(url)
    name = Path(parts.path).name or "weights"
    name = re.sub(r"[^\w.=-]+", "_", f"{name}_{parts.query}" if parts.query else name)
    folder = Path(parts.path.lstrip("/")).parent
    host = "" if parts.netloc == _DETECTRON2_HOST else re.sub(r"[^\w.-]", "_", parts.netloc)
    return Path(get_cache_dir(), host, *(p for p in folder.parts if p != ".."), name[-200:])


def _has_digest(file: Path, digest: str) -> bool:
    if not digest:
        return True
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest().startswith(digest)


def _digest_of(source: str, fragment: str) -> str:
    """The SHA-256, or its start, that a URL ends with."""
    if not fragment:
        return ""
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment)
    if match is None:
        raise UserError(
            f"MODEL.WEIGHTS {source} ends with #{fragment}: what follows # must be sha256= and at "
            "least the first 8 digits of the file's SHA-256"
        )
    return match[1].lower()


def _download(source: str, url: str, file: Path, digest: str) -> None:
    """Downloads into a folder beside the file, and moves what is whole and right to its place."""
    folder = file.with_name(f".{file.name}.download")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir()
    log = logging.getLogger("iopath.common.download")
    quiet, log.disabled = log.disabled, True  # its errors are raised, too
    try:
        with _timeout():
            path = Path(download(url, str(folder), filename=file.name))
        if not _has_digest(path, digest):
            with open(path, "rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            raise UserError(
                f"{source} is another file: the one that the server has begins its SHA-256 with "
                f"{found[:16]}, give the right #sha256= or another address"
            )
        os.replace(path, file)
    finally:
        log.disabled = quiet
        shutil.rmtree(folder, ignore_errors=True)


def _fetch_url(source: str, url: str) -> str:
    url, _, fragment = url.partition("#")
    digest = _digest_of(source, fragment)
    file = _cached_file(url)
    try:
        if file.is_file() and _has_digest(file, digest):
            return str(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(file)):
            if not file.is_file() or not _has_digest(file, digest):
                _download(source, url, file, digest)
    except (OSError, HTTPException, LockException, ValueError) as error:
        raise _cannot(source, error) from error
    return str(file)


# --- the hub -------------------------------------------------------------------------------------


def _hub_reason(error: Exception, repo: str) -> str:
    if isinstance(error, GatedRepoError):
        return f"{repo} is for those who have accepted its terms: run hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no public repository {repo}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{repo} has no such file"
    if isinstance(error, LocalEntryNotFoundError):
        offline = os.environ.get("HF_HUB_OFFLINE")
        why = f"HF_HUB_OFFLINE is {offline}" if offline else "the hub does not answer"
        return f"{why}, and it is not in the hub's cache on this machine"
    return ""


def _find_in_cache(repo: str, revision: str | None, names: tuple[str, ...]) -> str | None:
    """The first of some files that is in the hub's cache; taken as it is, without a network."""
    for name in names:
        if isinstance(cached := try_to_load_from_cache(repo, name, revision=revision), str):
            return cached
    return None


def _hub_file(source: str, repo: str, revision: str | None, names: tuple[str, ...]) -> str:
    """The first of some files that a repository has."""
    try:
        if cached := _find_in_cache(repo, revision, names):
            return cached
        for name in names[:-1]:
            with contextlib.suppress(RemoteEntryNotFoundError):
                return hf_hub_download(repo, name, revision=revision)
        return hf_hub_download(repo, names[-1], revision=revision)
    except _HUB_ERRORS as error:
        raise _cannot(source, error, _hub_reason(error, repo)) from error


def _pixels_of(config: Mapping) -> dict[str, str | list[float]]:
    """Pixel statistics of a config of timm's, whose units are 0 to 1."""
    mean, std = config.get("mean"), config.get("std")
    if not mean or not std or len(mean) != 3 or len(std) != 3:
        return {}
    mean, std = ([round(255 * x, 3) for x in values] for values in (mean, std))
    return {"format": "RGB", "mean": mean, "std": std}


def _classes_of(config: Mapping) -> list[str] | None:
    names = config.get("label_names")
    return [str(name) for name in names] if names and isinstance(names, list | tuple) else None


def _read_hub_config(repo: str, revision: str | None, offline: bool) -> Mapping:
    """What a repository's config says in timm's form; empty where it has none."""
    try:
        find = _find_in_cache if offline else partial(_hub_file, "")
        file = find(repo, revision, (_HUB_CONFIG,))
        content = json.loads(Path(file).read_text()) if file else {}
    except (OSError, ValueError, UserError):
        return {}
    if not isinstance(content, Mapping):
        return {}
    config = content.get("pretrained_cfg", content)
    return {**content, **config} if isinstance(config, Mapping) else content


def _fetch_hub(source: str, address: str) -> Fetched:
    match = _HUB_ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(
            f"MODEL.WEIGHTS {source} is no address of the hub: write hf://OWNER/REPOSITORY, with "
            "/FILE behind it where it has several"
        )
    repo, revision, file = match.groups()
    names = (file,) if file else _HUB_FILES
    try:
        cached = _find_in_cache(repo, revision, names)
    except _HUB_ERRORS as error:
        raise _cannot(source, error, _hub_reason(error, repo)) from error
    path = cached or _hub_file(source, repo, revision, names)
    # Weights that came before came with their config, if there is one: no network is needed.
    config = _read_hub_config(repo, revision, offline=cached is not None)
    return Fetched(path, f"{repo}'s {_HUB_CONFIG}", _pixels_of(config), _classes_of(config))


def _fetch_timm(source: str, name: str) -> Fetched:
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise UserError(
            f"MODEL.WEIGHTS {source}: timm has no such weights of this network, it has "
            f"{', '.join(tags) or 'none'}"
        ) from error
    if config is None:
        near = nearest(name, timm.list_pretrained())
        raise UserError(f"MODEL.WEIGHTS {source}: timm has no such network, the nearest is {near}")
    if config.hf_hub_id:
        repo, _, revision = config.hf_hub_id.partition("@")
        names = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
        path = _hub_file(source, repo, revision or None, names)
    elif isinstance(config.url, str) and config.url:
        path = _fetch_url(source, config.url)
    else:
        raise UserError(f"MODEL.WEIGHTS {source}: no weights of it are published")
    facts = config.to_dict()
    return Fetched(path, "timm's config of it", _pixels_of(facts), _classes_of(facts))


# --- the whole -----------------------------------------------------------------------------------


def fetch_weights(source: str) -> Fetched:
    """The file on this machine that MODEL.WEIGHTS stands for, fetched if need be.

    Args:
        source: a file; ``timm://NAME`` for weights that timm knows; ``hf://OWNER/REPO[@REVISION]``
            with a ``/FILE`` for the hub; a URL, with ``#sha256=DIGEST`` to be checked; or any other
            address of Detectron2's ``PathManager``.

    Raises:
        UserError: if it cannot be had.
    """
    scheme, mark, address = source.partition("://")
    if not mark:
        return Fetched(source)
    if scheme == "timm":
        return _fetch_timm(source, address)
    if scheme == "hf":
        return _fetch_hub(source, address)
    if scheme == "detectron2":
        return Fetched(_fetch_url(source, Detectron2Handler.S3_DETECTRON2_PREFIX + address))
    try:
        if scheme == "catalog":
            return Fetched(_fetch_url(source, ModelCatalog.get(address)))
        share = source.startswith(OneDrivePathHandler.ONE_DRIVE_PREFIX)
        if scheme in ("http", "https", "ftp") and not share:
            return Fetched(_fetch_url(source, source))
        return Fetched(PathManager.get_local_path(source))
    except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise _cannot(source, error) from error
