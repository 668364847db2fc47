"""Downloads weights that MODEL.WEIGHTS gives as an address, into the libraries' caches.

A file gets its name once it is complete and its hash is correct. Later runs use the cached file,
without a network connection. It is cached under its full address, so servers cannot replace each
other's files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

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
from iopath.common.file_io import file_lock, get_cache_dir
from portalocker.exceptions import LockException
from timm.models import get_pretrained_cfg
from tqdm import tqdm

from contnet.checkpoint.names import published_file
from contnet.checkpoint.verification import digest_in_name
from contnet.utils.addresses import CREDENTIALS_ADVICE, has_credentials
from contnet.utils.errors import UserError
from contnet.utils.files import atomic_write, explain_os_error
from contnet.utils.text import nearest, printable

__all__ = ["Fetched", "fetch_weights"]

# Timeout for an answer of a server, in seconds.
_TIMEOUT = 30
# Size of the largest file that is downloaded, in bytes.
_LARGEST = 2**36
# Characters that are kept in a URL; others, except ASCII letters and digits, are percent-encoded.
_IN_URLS = string.punctuation
# Weight files in a repository of the hub; the first one that exists is used.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_CONFIG = "config.json"
# Groups of an hf:// address: owner and name, revision, file.
_HUB_ADDRESS = re.compile(r"([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")
# Errors of the hub's client, including those of its HTTP library.
_HUB_ERRORS = (*HfHubHTTPError.__bases__, EntryNotFoundError, HFValidationError, ValueError)


@dataclass(frozen=True)
class Fetched:
    """A file of weights on this machine.

    Attributes:
        path: path of the file.
        digest: its SHA-256 or the start of it, if the address contains it.
        maker: the source of ``pixels``; "" if they are unknown.
        pixels: "format", "mean" and "std" of the channels, for values from 0 to 255.
        classes: names of the classes, in order; None if they are unknown.
    """

    path: str
    digest: str = ""
    maker: str = ""
    pixels: dict[str, str | list[float]] = field(default_factory=dict)
    classes: list[str] | None = None


# --- addresses of files --------------------------------------------------------------------------


class _Redirects(HTTPRedirectHandler):
    """Follows redirects only to http(s) addresses, and never from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after not in ("https", before):
            raise URLError(f"the server redirects to {after}://")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return printable(f"the server says {error.code} {error.reason}", 200)
    reason = getattr(error, "reason", error)
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return printable(str(reason).splitlines()[0], 200) if str(reason) else type(error).__name__


def _cannot(source: str, error: Exception, reason: str = "") -> UserError:
    """Returns the error for a failed download, in one line."""
    advice = "without a network connection, copy the file and set MODEL.WEIGHTS to it"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        advice = "FVCORE_CACHE, HF_HOME and TORCH_HOME set the cache folders"
    return UserError(f"{source} cannot be downloaded ({reason or _reason(error)}): {advice}")


def _cached_file(url: str) -> Path:
    """Returns the path of a URL's file in iopath's cache, in a folder of its own."""
    name = re.sub(r"[^\w.-]+", "_", unquote(urlsplit(url).path).rpartition("/")[2])[-100:]
    key = hashlib.sha256(url.encode()).hexdigest()[:32]
    return Path(get_cache_dir(), "contnet", key, name.lstrip(".") or "weights")


def _has_digest(file: Path, digest: str) -> bool:
    if not digest:
        return True
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest().startswith(digest)


def _digest_of(source: str, url: str, fragment: str) -> str:
    """Returns the (start of the) SHA-256 at the end of a URL or of its file's name; "" if none."""
    if not fragment:
        return digest_in_name(urlsplit(url).path)
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment)
    if match is None:
        raise UserError(
            f"MODEL.WEIGHTS {source} ends with #{fragment}: what follows # must be sha256= and at "
            "least the first 8 digits of the file's SHA-256"
        )
    return match[1].lower()


def _receive(url: str, file: BinaryIO) -> str:
    """Downloads a complete file into ``file``; returns its SHA-256."""
    digest, received = hashlib.sha256(), 0
    with build_opener(_Redirects).open(Request(url), timeout=_TIMEOUT) as answer:
        length = answer.headers.get("Content-Length")
        total = int(length) if length else None
        with tqdm(total=total, unit="B", unit_scale=True, desc=Path(file.name).stem) as bar:
            while block := answer.read(2**20):
                received += len(block)
                if received > _LARGEST:
                    raise ValueError(f"it is larger than {_LARGEST >> 30} GiB")
                digest.update(block)
                file.write(block)
                bar.update(len(block))
    if not received or total not in (None, received):
        raise ValueError(f"it was truncated, {received} of {total} bytes arrived")
    return digest.hexdigest()


def _download(source: str, url: str, path: Path, digest: str) -> None:
    """Downloads a file, which gets its name once it is complete and verified."""
    with atomic_write(path) as file:
        found = _receive(url, file)
        if not found.startswith(digest):
            raise UserError(
                f"{source} is another file: the SHA-256 of the server's file begins with "
                f"{found[:16]}, give the right #sha256= or another address"
            )


def _fetch_url(source: str, url: str) -> Fetched:
    url, _, fragment = url.partition("#")
    try:
        url = quote(url, safe=_IN_URLS)
        digest = _digest_of(source, url, fragment)
        path = _cached_file(url)
    except ValueError as error:  # not a valid address
        raise _cannot(source, error) from error
    try:
        if not path.is_file() or not _has_digest(path, digest):
            path.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(str(path)):
                if not path.is_file() or not _has_digest(path, digest):
                    _download(source, url, path, digest)
    except (HTTPException, LockException, URLError, ValueError) as error:
        raise _cannot(source, error) from error
    except OSError as error:
        raise _cannot(source, error, explain_os_error(error, path)) from error
    return Fetched(str(path), digest)


# --- the hub -------------------------------------------------------------------------------------


def _hub_reason(error: Exception, repo: str) -> str:
    if isinstance(error, GatedRepoError):
        return f"{repo} requires accepting its terms: run hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no public repository {repo}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{repo} has no such file"
    if isinstance(error, LocalEntryNotFoundError):
        offline = os.environ.get("HF_HUB_OFFLINE")
        why = f"HF_HUB_OFFLINE is {offline}" if offline else "the hub does not respond"
        return f"{why}, and it is not in the hub's cache on this machine"
    return ""


def _find_in_cache(repo: str, revision: str | None, names: tuple[str, ...]) -> str | None:
    """Returns the first of several files in the hub's cache; needs no network connection."""
    for name in names:
        if isinstance(cached := try_to_load_from_cache(repo, name, revision=revision), str):
            return cached
    return None


def _hub_file(source: str, repo: str, revision: str | None, names: tuple[str, ...]) -> str:
    """Returns the first of several files that exists in a repository; downloads it if needed."""
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
    """Converts the pixel statistics of a timm config from values in [0, 1] to [0, 255]."""
    mean, std = config.get("mean"), config.get("std")
    for values in (mean, std):
        if not isinstance(values, list | tuple) or len(values) != 3:
            return {}
        if not all(isinstance(value, int | float) for value in values):
            return {}
    mean, std = ([round(255 * x, 3) for x in values] for values in (mean, std))
    return {"format": "RGB", "mean": mean, "std": std}


def _classes_of(config: Mapping) -> list[str] | None:
    names = config.get("label_names")
    return [str(name) for name in names] if names and isinstance(names, list | tuple) else None


def _read_hub_config(repo: str, revision: str | None, offline: bool) -> Mapping:
    """Reads a repository's config in timm's format; empty if it has none."""
    try:
        find = _find_in_cache if offline else partial(_hub_file, "")
        file = find(repo, revision, (_HUB_CONFIG,))
        content = json.loads(Path(file).read_text()) if file else {}
    except (OSError, RecursionError, ValueError, UserError):
        return {}
    if not isinstance(content, Mapping):
        return {}
    config = content.get("pretrained_cfg", content)
    return {**content, **config} if isinstance(config, Mapping) else content


def _fetch_hub(source: str, address: str) -> Fetched:
    match = _HUB_ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(
            f"MODEL.WEIGHTS {source} is not an address of the hub: write hf://OWNER/REPOSITORY, "
            "with /FILE if it has several"
        )
    repo, revision, file = match.groups()
    if ".." in address.replace("@", "/").split("/"):
        raise UserError(f"MODEL.WEIGHTS {source} leads out of the hub's cache: remove ..")
    names = (file,) if file else _HUB_FILES
    try:
        cached = _find_in_cache(repo, revision, names)
    except _HUB_ERRORS as error:
        raise _cannot(source, error, _hub_reason(error, repo)) from error
    path = cached or _hub_file(source, repo, revision, names)
    # The config of cached weights is also cached, if it exists, so no network is needed.
    config = _read_hub_config(repo, revision, offline=cached is not None)
    maker = f"{repo}'s {_HUB_CONFIG}"
    return Fetched(path, "", maker, _pixels_of(config), _classes_of(config))


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
        raise UserError(f"MODEL.WEIGHTS {source}: timm has no such network; the nearest is {near}")
    if config.hf_hub_id:
        repo, _, revision = config.hf_hub_id.partition("@")
        names = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
        fetched = Fetched(_hub_file(source, repo, revision or None, names))
    elif isinstance(config.url, str) and config.url:
        fetched = _fetch_url(source, config.url)
    else:
        raise UserError(f"MODEL.WEIGHTS {source}: it has no published weights")
    facts = config.to_dict()
    pixels, classes = _pixels_of(facts), _classes_of(facts)
    return replace(fetched, maker="timm's config of it", pixels=pixels, classes=classes)


# --- all sources ---------------------------------------------------------------------------------


def fetch_weights(source: str) -> Fetched:
    """Returns the local file for MODEL.WEIGHTS; downloads it if necessary.

    Args:
        source: a file; the folder of a published model; ``timm://NAME`` for weights in timm;
            ``hf://OWNER/REPO[@REVISION]``, optionally with ``/FILE``, for the hub; a URL, with
            ``#sha256=DIGEST`` to check it; or an address with a scheme that is registered in
            Detectron2's ``PathManager``.

    Raises:
        UserError: if the file cannot be downloaded, or the address has a password or a token.
    """
    scheme, mark, address = source.partition("://")
    if not mark:
        return Fetched(str(published_file(source) or source) if os.path.isdir(source) else source)
    if has_credentials(source):
        raise UserError(f"MODEL.WEIGHTS {source} {CREDENTIALS_ADVICE}")
    if scheme == "timm":
        return _fetch_timm(source, address)
    if scheme == "hf":
        return _fetch_hub(source, address)
    if scheme == "detectron2":
        return _fetch_url(source, Detectron2Handler.S3_DETECTRON2_PREFIX + address)
    if source.startswith(OneDrivePathHandler.ONE_DRIVE_PREFIX):
        return _fetch_url(source, OneDrivePathHandler().create_one_drive_direct_download(source))
    if scheme.lower() in ("http", "https"):
        return _fetch_url(source, source)
    try:
        if scheme == "catalog":
            return _fetch_url(source, ModelCatalog.get(address))
        path = PathManager.get_local_path(source) if scheme not in ("file", "ftp") else ""
    except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise _cannot(source, error) from error
    if not os.path.isfile(path):
        raise UserError(
            f"MODEL.WEIGHTS {source} cannot be downloaded: give the path of a file, or an address "
            "of https://, hf://, timm:// or detectron2://"
        )
    return Fetched(path)
