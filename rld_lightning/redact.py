"""Secrets kept out of what is written: passwords, keys, tokens, and addresses that hold them.

A value is a secret by its name (``secret``, ``api_key``, ``Authorization``, the ``key`` of a store's options, ...) or
as the password of an address. Of structures the value is replaced by its name; of texts, such as overrides, by its
name and wherever a secret that has been seen in a structure stands in them.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

HIDDEN = "REDACTED"  # neither a shell, nor Hydra, nor YAML reads anything into it

_SHORTEST = 6  # characters of a secret that is looked for in texts: a shorter one stands in other words by chance
_WORDS = (
    r"secret|passw(?:or)?d|passphrase|pwd|token|credentials?|authorization|cookie|signature|sas|connection[_-]?string|"
    r"\bsig|\bauth|"  # of an address signed by Azure, and of a request; words that only end so are none
    r"(?:api|access|private|account|shared|signing|encryption|ssh)[_-]?key(?:[_-]?id)?"
)
_NAME = re.compile(rf"(?:{_WORDS})$|secret|password")  # of a key in lower case, without hyphens
# Options of stores call a password's other half `key`, or have nothing but it.
_STORE = re.compile(r"(?:storage_options|client_kwargs|credentials|headers)\b")
_IN_STORE = re.compile(r"(?:key|user(?:name)?)$")
_REFERENCE = re.compile(r"\$\{[\w.:]+\}")  # names where the secret stands
# The rest of `name=value`, `name: value` and `"name": "value"`, to the end of the value.
_VALUE = (
    r"""(?P<sign>["']?\s*[=:]\s*)"""
    r"""(?P<value>"[^"]*"|'[^']*'|\$\{[^}]*\}|(?:bearer|basic)\s+[^\s,&;"'}\]]+|[^\s,&;"'}\]{\[]+)"""
)
_ASSIGNED = re.compile(rf"(?P<name>[\w.@-]*(?:{_WORDS})){_VALUE}", re.IGNORECASE)
_ASSIGNED_IN_STORE = re.compile(rf"(?P<name>\b(?:storage_options[\w.]*\.)?(?:key|user(?:name)?)){_VALUE}")
_OVERRIDE = re.compile(r"[+~]*([\w.@/-]+)=(.+)\Z", re.DOTALL)
_USER = re.compile(r"(\w[\w+.-]*://)(?:[^\s/]*:[^\s/]*|(?<=http://)[^\s/:@]+|(?<=https://)[^\s/:@]+)@")
_known: set[str] = set()


def redact(values: Any) -> Any:
    """A copy of nested plain values without secrets: of mappings, lists and plain values, such as a configuration."""
    remember(values)
    return _redacted(values, "")


def remember(values: Any) -> None:
    """Lets :func:`redact_text` know the secrets of nested plain values, wherever they turn up from now on."""
    _known.update(text for text in map(str, _secrets(values, "")) if len(text) >= _SHORTEST)


def remember_environment() -> None:
    """Likewise those in the environment, by the names of variables; of which ``PWD`` is a folder, and no password."""
    remember({name: value for name, value in os.environ.items() if name not in ("PWD", "OLDPWD")})


def redact_text(text: str) -> str:
    """A text, such as an override, a command or a message, without secrets."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    if (override := _OVERRIDE.match(text)) and is_secret(override[1]) and not _is_harmless(override[2]):
        return f"{override[0].removesuffix(override[2])}{HIDDEN}"  # whatever its value is made of
    text = _USER.sub(rf"\g<1>{HIDDEN}@", text)
    patterns = (_ASSIGNED, _ASSIGNED_IN_STORE) if _STORE.search(text) else (_ASSIGNED,)
    for pattern in patterns:
        text = pattern.sub(lambda found: f"{found['name']}{found['sign']}{_kept(found['value'])}", text)
    return text


def redact_command(arguments: Iterable[str]) -> list[str]:
    """A command line without secrets."""
    return [redact_text(argument) for argument in arguments]


def is_secret(key: str) -> bool:
    """Whether the value of a key is one by its name.

    Args:
        key: the full one, such as ``data.storage_options.secret``.
    """
    above, _, last = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).replace("-", "_").lower().rpartition(".")
    return bool(_NAME.search(last) or (_STORE.search(above) and _IN_STORE.search(last)))


def _redacted(values: Any, key: str) -> Any:
    if isinstance(values, Mapping):
        return {name: _redacted(value, _inner(key, name)) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_redacted(value, key) for value in values]
    if _is_secret_value(key, values):
        return HIDDEN
    return redact_text(values) if isinstance(values, str) else values


def _secrets(values: Any, key: str) -> Iterator[Any]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _secrets(value, _inner(key, name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _secrets(value, key)
    elif _is_secret_value(key, values):
        yield values


def _inner(key: str, name: object) -> str:
    """The key of a value; all that stands below a secret is one."""
    return key if is_secret(key) else f"{key}.{name}".lstrip(".")


def _is_secret_value(key: str, value: Any) -> bool:
    """Whether a plain value of a key is to be hidden; what is empty, a switch or the name of a variable is not."""
    return is_secret(key) and value is not None and not isinstance(value, bool) and not _is_harmless(str(value))


def _is_harmless(value: str) -> bool:
    nothing = value == HIDDEN or value.lower() in ("", "null", "none", "true", "false", "???")
    return nothing or bool(_REFERENCE.fullmatch(value))


def _kept(value: str) -> str:
    return value if _is_harmless(value.strip("\"'")) else HIDDEN


remember_environment()
