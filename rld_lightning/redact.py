"""Redacts secrets from output: passwords, keys, tokens, and addresses that contain them.

A value is a secret by its name (``secret``, ``api_key``, ``Authorization``, the ``key`` of a store's options, ...) or
as the password of an address. In structures, values are redacted by their name; in texts, such as overrides, by their
name, and at every occurrence of a secret that was seen in a structure.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

HIDDEN = "REDACTED"  # has no special meaning in shells, Hydra or YAML

_SHORTEST = 6  # characters of a secret that is searched in texts: a shorter one occurs in other words by chance
_WORDS = (
    r"secret|passw(?:or)?d|passphrase|pwd|token|credentials?|authorization|cookie|signature|sas|connection[_-]?string|"
    r"\bsig|\bauth|"  # of Azure's signed addresses, and of requests; not as the end of other words
    r"(?:api|access|private|account|shared|signing|encryption|ssh)[_-]?key(?:[_-]?id)?"
)
_NAME = re.compile(rf"(?:{_WORDS})$|secret|password")  # of a key in lower case, without hyphens
# A store's options name the other half of a password `key`, or have only that.
_STORE = re.compile(r"(?:storage_options|client_kwargs|credentials|headers)\b")
_IN_STORE = re.compile(r"(?:key|user(?:name)?)$")
_REFERENCE = re.compile(r"\$\{[\w.:]+\}")  # refers to where the secret is
# The rest of `name=value`, `name: value` and `"name": "value"`, up to the value's end.
_VALUE = (
    r"""(?P<sign>["']?\s*[=:]\s*)"""
    r"""(?P<value>"[^"]*"|'[^']*'|\$\{[^}]*\}|(?:bearer|basic)\s+[^\s,&;"'}\]]+|[^\s,&;"'}\]{\[]+)"""
)
# No pattern repeats before a literal, since searching it in a long word from a file would take hours.
_ASSIGNED = re.compile(rf"(?P<name>{_WORDS}){_VALUE}", re.IGNORECASE)
_ASSIGNED_IN_STORE = re.compile(rf"(?P<name>\bkey|\buser(?:name)?){_VALUE}")
_OVERRIDE = re.compile(r"[+~]*([\w.@/-]+)=(.+)\Z", re.DOTALL)
_USER = re.compile(r"([\w+.-]://)(?:[^\s/:]*:[^\s/]*|(?<=http://)[^\s/:@]+|(?<=https://)[^\s/:@]+)@")
_known: set[str] = set()


def redact(values: Any) -> Any:
    """Returns a copy without secrets of nested mappings, lists and plain values, such as a configuration."""
    remember(values)
    return _redacted(values, "")


def remember(values: Any) -> None:
    """Registers the secrets in nested plain values, for :func:`redact_text` to redact from now on."""
    _known.update(text for text in map(str, _secrets(values, "")) if len(text) >= _SHORTEST)


def remember_environment() -> None:
    """Registers the secrets among the environment variables, by name; ``PWD`` is a folder, not a password."""
    remember({name: value for name, value in os.environ.items() if name not in ("PWD", "OLDPWD")})


def redact_text(text: str) -> str:
    """Returns a text, such as an override, a command or a message, without secrets."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    if (override := _OVERRIDE.match(text)) and is_secret(override[1]) and not _is_harmless(override[2]):
        return f"{override[0].removesuffix(override[2])}{HIDDEN}"  # whatever the value contains
    text = _USER.sub(rf"\g<1>{HIDDEN}@", text)
    patterns = (_ASSIGNED, _ASSIGNED_IN_STORE) if _STORE.search(text) else (_ASSIGNED,)
    for pattern in patterns:
        text = pattern.sub(lambda found: f"{found['name']}{found['sign']}{_hidden(found['value'])}", text)
    return text


def redact_command(arguments: Iterable[str]) -> list[str]:
    """Returns a command line without secrets."""
    return [redact_text(argument) for argument in arguments]


def is_secret(key: str) -> bool:
    """Whether a key's name marks its value as a secret.

    Args:
        key: the full key, such as ``data.storage_options.secret``.
    """
    above, _, last = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).replace("-", "_").lower().rpartition(".")
    return bool(_NAME.search(last) or (_STORE.search(above) and _IN_STORE.search(last)))


def _redacted(values: Any, key: str) -> Any:
    if isinstance(values, Mapping):
        return {name: _redacted(value, _child_key(key, name)) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_redacted(value, key) for value in values]
    if _is_secret_value(key, values):
        return HIDDEN
    return redact_text(values) if isinstance(values, str) else values


def _secrets(values: Any, key: str) -> Iterator[Any]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _secrets(value, _child_key(key, name))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _secrets(value, key)
    elif _is_secret_value(key, values):
        yield values


def _child_key(key: str, name: object) -> str:
    """Returns the key of a nested value; everything below a secret is secret."""
    return key if is_secret(key) else f"{key}.{name}".lstrip(".")


def _is_secret_value(key: str, value: Any) -> bool:
    """Whether to hide a plain value; not if it is empty, a boolean or a reference to a variable."""
    return is_secret(key) and value is not None and not isinstance(value, bool) and not _is_harmless(str(value))


def _is_harmless(value: str) -> bool:
    nothing = value == HIDDEN or value.lower() in ("", "null", "none", "true", "false", "???")
    return nothing or bool(_REFERENCE.fullmatch(value))


def _hidden(value: str) -> str:
    return value if _is_harmless(value.strip("\"'")) else HIDDEN


remember_environment()
