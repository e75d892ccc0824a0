"""A job's .hydra folder: all that Hydra writes itself, without secrets."""

import sys

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from rld_lightning.hydra.script import run_task

SECRETS = ("AKIAHIDDEN", "hunter2hunter2", "pass0rd9999", "urlpass77")
OVERRIDES = [
    "++storage_options={key:AKIAHIDDEN,secret:hunter2hunter2}",
    "+store.password=pass0rd9999",
    "+store.url='https://me:urlpass77@host/x'",
]


def written_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sweep_writes_no_secret_before_its_first_job(monkeypatch, tmp_path):
    options = ["-m", "seed=0", f"hydra.sweep.dir={tmp_path}", "out=/out", "data.root=/photos"]
    monkeypatch.setattr(sys, "argv", ["shards.py", *options, *OVERRIDES])
    monkeypatch.setattr("rld_lightning.hydra.script._write_job_config", lambda cfg: None)
    run_task(lambda cfg: None, "shards")
    text = (tmp_path / "multirun.yaml").read_text()
    assert "REDACTED" in text
    assert not [secret for secret in SECRETS if secret in text]


def test_the_jobs_of_a_sweep_get_secrets_and_write_none(monkeypatch, tmp_path):
    command = [
        "shards.py",
        "-m",
        "seed=0,1",
        f"hydra.sweep.dir={tmp_path}",
        "out=/out",
        "data.root=/photos",
        *OVERRIDES,
    ]
    monkeypatch.setattr(sys, "argv", command)
    got = []

    def task(cfg):
        got.append((cfg.storage_options.secret, cfg.store.password, cfg.seed))
        assert OmegaConf.to_container(HydraConfig.get().overrides.task)[-2] == OVERRIDES[-2]

    run_task(task, "shards")
    assert got == [("hunter2hunter2", "pass0rd9999", seed) for seed in (0, 1)]
    files = written_below(tmp_path)
    assert not [path for path, text in files.items() if any(secret.encode() in text for secret in SECRETS)]
    names = {path.name for path in files}
    assert names >= {"config.yaml", "hydra.yaml", "overrides.yaml", "multirun.yaml"}
    (first, *_) = sorted(path for path in files if path.name == "hydra.yaml")
    noted = {path.stem: yaml.safe_load(path.read_text()) for path in first.parent.iterdir()}
    assert noted["hydra"]["hydra"]["runtime"]["choices"]["data"] == "imagefolder"
    assert noted["overrides"][:2] == ["seed=0", "out=/out"]
    assert noted["config"]["store"] == {"password": "REDACTED", "url": "https://REDACTED@host/x"}
    assert noted["config"]["out"] == "/out"
