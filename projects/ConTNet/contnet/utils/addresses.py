"""Finds and hides passwords and tokens in URLs, which must not get into logs or files."""

import re

__all__ = ["CREDENTIALS_ADVICE", "has_credentials", "redact"]

CREDENTIALS_ADVICE = (
    "has a password or a token, which would get into logs and files: download the file and "
    "give its path, or for the Hugging Face hub give hf://OWNER/REPOSITORY/FILE and set HF_TOKEN"
)

# Without the scheme, because searching for it is slow in long texts.
_ADDRESS = re.compile(r"://[^\s'\"<>]+")
_USER = re.compile(r"(?<=://)[^/?#]+@")
# A question mark may be part of a value, or start another parameter.
_PARAMETER = re.compile(r"([?&;#])([^=?&;#]*)=[^?&;#]*")
_HIDDEN = re.compile(r"=\*\*\*[^&;#]*")
# A parameter is secret if its name contains one of these or its last word is in _SECRET_WORDS.
_SECRETS = (
    *("accesskey", "apikey", "auth", "credential", "passw", "secret", "session", "signature"),
    "token",
)
_SECRET_WORDS = ("key", "pwd", "sig")
# Names that are not secret: the number of a Google account, and authors.
_HARMLESS = re.compile(r"authuser|authors?(?![a-z])")


def _is_secret(name: str) -> bool:
    """Whether the name of a parameter marks it as secret, as in signed URLs."""
    name = _HARMLESS.sub("", name.lower())
    last = re.split(r"[_.-]", name)[-1]
    return name == "code" or last in _SECRET_WORDS or any(each in name for each in _SECRETS)


def _hide(parameter: re.Match) -> str:
    return f"{parameter[1]}{parameter[2]}=***" if _is_secret(parameter[2]) else parameter[0]


def _redact_address(address: re.Match) -> str:
    return _HIDDEN.sub("=***", _PARAMETER.sub(_hide, _USER.sub("***@", address[0])))


def redact(text: str) -> str:
    """Replaces passwords and tokens in the URLs of a text with stars."""
    return _ADDRESS.sub(_redact_address, text)


def has_credentials(text: str) -> bool:
    """Whether a URL in a text contains a password or a token."""
    return redact(text) != text
