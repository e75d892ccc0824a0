"""Determining server, key and answer, with misbehaving servers on this machine."""

import os
from urllib.parse import urlsplit

import pytest
from helpers.wandb_stub import serving

from rld_lightning.tracking.server import HOSTED, server, server_problem, wandb_mode


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)


def test_offline_without_a_key(monkeypatch, tmp_path):
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_key_and_server_of_wandb_login_are_used(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password key\n")
    assert urlsplit(server()).hostname in HOSTED
    assert wandb_mode() == "offline"
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example.org/\n")
    assert (server(), wandb_mode()) == ("https://wandb.example.org", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert (server(), wandb_mode()) == ("http://127.0.0.1:9", "offline")


@pytest.mark.parametrize("content", [b"[default]\nbase_url = http://a%20b\n", b"[default", b"\xff\xfe", None])
def test_other_files_at_the_places_of_wandb_s_neither_block_nor_fail(tmp_path, content):
    for name in ("settings", "netrc"):
        if content is None:
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
    assert wandb_mode() == "offline"
    assert server() == "http://a%20b" or urlsplit(server()).hostname in HOSTED


@pytest.mark.parametrize("address", ["http://[::1", "http://a b/", "http://h:x", "nowhere"])
def test_an_address_that_is_none_is_a_problem_in_words(monkeypatch, tmp_path, address):
    (tmp_path / "netrc").write_text("machine x login user password key\n")
    monkeypatch.setenv("WANDB_BASE_URL", address)
    assert wandb_mode() == "offline"
    assert server_problem(20).startswith(("does not answer as W&B does (", "cannot be reached ("))


@pytest.mark.parametrize("name", HOSTED)
def test_key_of_the_hosted_service_is_found_under_either_name(tmp_path, name):
    (tmp_path / "netrc").write_text(f"machine {name} login user password key\n")
    assert wandb_mode() == "online"


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        ("well", None),
        ("late", "does not answer within 0.5 s"),
        ("drip", "does not answer within 0.5 s"),
        ("error", "answers with an error (500)"),
        ("refuse", "refuses the key"),
        ("stranger", "does not answer as W&B does (TypeError)"),
        ("deep", "does not answer as W&B does (RecursionError)"),
        ("headers", "does not answer as W&B does (HTTPException)"),
    ],
)
def test_server_problems_are_reported_in_time(monkeypatch, behaviour, told):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with serving(behaviour) as stub:
        monkeypatch.setenv("WANDB_BASE_URL", stub.address)
        assert server_problem(0.5 if told and "0.5" in told else 20) == told


def test_unreachable_server_is_reported(monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert server_problem(20).startswith("cannot be reached (")
