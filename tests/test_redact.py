"""The redaction of secrets in configs, overrides and messages."""

import time

import pytest

from rld_lightning.redact import HIDDEN, redact, redact_command, redact_text, remember_environment


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr("rld_lightning.redact._known", set())


NAMES = (
    *("secret", "password", "passwd", "api_key", "apiKey", "X-Api-Key", "access-key-id", "aws_secret_access_key"),
    *("account_key", "private_key", "session_token", "Authorization", "connection_string", "cookie", "auth", "sig"),
)


@pytest.mark.parametrize("key", NAMES)
def test_values_are_secrets_by_their_names(key):
    assert redact({"a": {key: "x1y2z3"}}) == {"a": {key: HIDDEN}}
    assert redact({key: 12345}) == {key: HIDDEN}
    assert redact({key: {"whatever": ["below", "it"]}}) == {key: {"whatever": [HIDDEN, HIDDEN]}}
    assert redact_text(f"store.{key}=x1y2z3") == f"store.{key}={HIDDEN}"
    assert redact_text(f"cannot reach it: {key}='q8w7e6' is wrong") == f"cannot reach it: {key}={HIDDEN} is wrong"


@pytest.mark.parametrize(
    "values",
    [
        {"key": "loss.alpha", "keys": 3, "num_tokens": 4, "monitor": "val/top1", "tokens": ["a"]},
        {"secret": None, "password": "", "token": False, "api_key": "${oc.env:KEY}"},  # empty, or a reference
        {"url": "s3://bucket/a?list=1", "host": "http://localhost:9000/a@b", "git": "ssh://git@host/x"},
        {"augment": "cutout:16,flip", "optimizer": "torch.optim.SGD", "design": "small", "insig": 1},
    ],
)
def test_other_values_are_unchanged(values):
    assert redact(values) == values
    for key, value in values.items():
        assert redact_text(f"{key}={value}") == f"{key}={value}"


def test_storage_keys_and_references_with_defaults_are_secrets():
    options = {"key": "AKIA", "username": "me", "endpoint_url": "http://h:9000", "anon": False}
    assert redact({"storage_options": options})["storage_options"] == options | {"key": HIDDEN, "username": HIDDEN}
    assert redact_text("data.storage_options={key:AK,endpoint_url:'http://h:9000'}").startswith(
        "data.storage_options={key:REDACTED,endpoint_url:'http://h:9000'"
    )
    assert redact({"password": "${oc.env:PW,hunter2}"}) == {"password": HIDDEN}


@pytest.mark.parametrize(
    ("address", "without"),
    [
        ("https://me:p@ss@host:80/x", "https://REDACTED@host:80/x"),
        ("https://ghp_abc@github.com/a.git", "https://REDACTED@github.com/a.git"),
        ("ftp://me:pw@host", "ftp://REDACTED@host"),
        ("https://h/x?X-Amz-Signature=abc&a=1", "https://h/x?X-Amz-Signature=REDACTED&a=1"),
        ("https://h/x?sv=2022&sig=aB%2Fc&se=1", "https://h/x?sv=2022&sig=REDACTED&se=1"),
    ],
)
def test_credentials_in_addresses_are_hidden(address, without):
    assert redact({"data": {"root": address}}) == {"data": {"root": without}}
    assert redact_text(f"data.root={address}") == f"data.root={without}"
    assert redact_text(f"{address} does not answer") == f"{without} does not answer"


@pytest.mark.parametrize("text", ["x", "a.", "a@b.", "storage_options.", "a://:", "token "])
def test_long_texts_of_files_are_searched_in_moderate_time(text):
    text *= 200_000 // len(text)
    started = time.process_time()
    assert redact_text(text) == text
    assert redact_text(f"{text} token=abc {text}") == f"{text} token={HIDDEN} {text}"
    assert time.process_time() - started < 2


def test_a_known_secret_is_hidden_everywhere():
    seen = redact({"store": {"secret": "hunter2!x"}, "command": ["fit.py --with hunter2!x"], "of": "hunter2!x/y"})
    assert seen == {"store": {"secret": HIDDEN}, "command": [f"fit.py --with {HIDDEN}"], "of": f"{HIDDEN}/y"}
    assert redact_command(["fit.py", "a=[hunter2!x]", "seed=1"]) == ["fit.py", f"a=[{HIDDEN}]", "seed=1"]
    redact({"token": "val"})  # too short to be distinguished from other words
    assert redact_text("val/top1") == "val/top1"


def test_a_secret_of_the_environment_is_hidden_in_any_value(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "k3y-of-mine")
    monkeypatch.setenv("PWD", "/home/me/work")
    remember_environment()
    assert redact({"notes": "by k3y-of-mine in /home/me/work"}) == {"notes": f"by {HIDDEN} in /home/me/work"}
