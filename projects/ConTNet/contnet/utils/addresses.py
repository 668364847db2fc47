"""Passwords and tokens in addresses, which must get into no log and no file."""

import re

__all__ = ["CREDENTIALS_ADVICE", "has_credentials", "redact"]

CREDENTIALS_ADVICE = (
    "has a password or a token, which would get into logs and files: fetch the file yourself and "
    "give its path, or for the Hugging Face hub give hf://OWNER/REPOSITORY/FILE and set HF_TOKEN"
)

# What follows the scheme, before which a text may go on for long.
_ADDRESS = re.compile(r"://[^\s'\"<>]+")
_USER = re.compile(r"(?<=://)[^/?#]+@")
# A question mark may be in a value, and may begin one more parameter.
_PARAMETER = re.compile(r"([?&;#])([^=?&;#]*)=[^?&;#]*")
_HIDDEN = re.compile(r"=\*\*\*[^&;#]*")
# Parameters are secret whose names have one of these, or whose last word is one of the second.
_SECRETS = (
    *("accesskey", "apikey", "auth", "credential", "passw", "secret", "session", "signature"),
    "token",
)
_SECRET_WORDS = ("key", "pwd", "sig")
# The number of a Google account; who has written something.
_HARMLESS = re.compile(r"authuser|authors?(?![a-z])")


def _is_secret(name: str) -> bool:
    """Whether a parameter says by its name that it is secret, as those of signed addresses do."""
    name = _HARMLESS.sub("", name.lower())
    last = re.split(r"[_.-]", name)[-1]
    return name == "code" or last in _SECRET_WORDS or any(each in name for each in _SECRETS)


def _hide(parameter: re.Match) -> str:
    return f"{parameter[1]}{parameter[2]}=***" if _is_secret(parameter[2]) else parameter[0]


def _redact_address(address: re.Match) -> str:
    return _HIDDEN.sub("=***", _PARAMETER.sub(_hide, _USER.sub("***@", address[0])))


def redact(text: str) -> str:
    """Replaces passwords and tokens in a text's addresses by stars."""
    return _ADDRESS.sub(_redact_address, text)


def has_credentials(text: str) -> bool:
    """Whether an address in a text has a password or a token."""
    return redact(text) != text
