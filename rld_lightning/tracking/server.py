"""Determines the W&B server, its key, and whether it answers, without starting wandb."""

import base64
import configparser
import json
import netrc
import os
import threading
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

# Two names of the hosted service, the older first; a key may be stored under either.
HOSTED = ("api.wandb.ai", "api.forge.coreweave.com")
_MOST_BYTES = 1 << 20  # of an answer


def wandb_mode() -> str:
    """Returns W&B's mode: ``WANDB_MODE`` if set, else ``online`` with a key and ``offline`` without.

    Does not ask wandb for the key, which would start a session and then ignore the mode.
    """
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether there is a key for the server, or a token instead."""
    return bool(os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _key(server()))


def server() -> str:
    """Returns the server's address, as wandb does: ``WANDB_BASE_URL``, or as set by ``wandb login --host``."""
    if os.environ.get("WANDB_BASE_URL"):
        return os.environ["WANDB_BASE_URL"].rstrip("/")
    settings = configparser.ConfigParser(interpolation=None)  # an address may contain "%"
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    try:
        settings.read(path for path in (folder / "settings", Path("wandb") / "settings") if path.is_file())
    except (OSError, ValueError, configparser.Error):  # ValueError: another encoding
        return _default()
    return settings.get("default", "base_url", fallback=_default()).rstrip("/")


def _default() -> str:
    """Returns the hosted service's address in the installed wandb."""
    try:
        from wandb.sdk.lib.urls import DEFAULT_BASE_URL
    except ImportError:  # wandb before 0.30
        return f"https://{HOSTED[0]}"
    return DEFAULT_BASE_URL


def server_problem(timeout: float) -> str | None:
    """Returns why the server cannot be used now, in words; None if it accepts the key.

    Args:
        timeout: total seconds to wait, whatever the server does.
    """
    found: list[str | None] = [f"does not answer within {timeout:g} s"]

    def ask() -> None:
        with suppress(TimeoutError):
            found[0] = _ask(timeout)

    # A thread, because urllib's timeout restarts with each piece of a slow answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return found[0]


def _ask(timeout: float) -> str | None:
    """Like :func:`server_problem`, but raises on a time-out."""
    address = server()
    headers = {"Content-Type": "application/json"}
    if key := _key(address):
        headers["Authorization"] = "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
    query = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    try:
        with urlopen(Request(f"{address}/graphql", query, headers), timeout=timeout) as answer:
            viewer = json.loads(answer.read(_MOST_BYTES))["data"]["viewer"]
    except HTTPError as error:
        return "refuses the key" if error.code in (401, 403) else f"answers with an error ({error.code})"
    except TimeoutError:
        raise
    except URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise error.reason from None
        return f"cannot be reached ({error.reason})"
    except (OSError, HTTPException, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"does not answer as W&B does ({type(error).__name__})"
    return "does not know the key" if key and viewer is None else None


def _key(address: str) -> str | None:
    if os.environ.get("WANDB_API_KEY"):
        return os.environ["WANDB_API_KEY"]
    given = os.environ.get("NETRC")
    try:
        if not Path(given or "~/.netrc").expanduser().is_file():
            return None
        host, known = urlsplit(address).hostname or "", netrc.netrc(given)
    except (OSError, ValueError, netrc.NetrcParseError):  # ValueError: not an address, or another encoding
        return None
    found = (known.authenticators(name) for name in (HOSTED if host in HOSTED else (host,)))
    return next((entry[2] for entry in found if entry), None)
