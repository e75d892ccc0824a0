"""W&B runs: the contents of their files; neither a server nor a crash of wandb stops training."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from helpers.wandb_stub import read_file, read_run, serving, values
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from rld_lightning.console import console
from rld_lightning.models.weights.read import read_weights
from rld_lightning.models.weights.save import save_weights
from rld_lightning.tracking import WandbLogger
from rld_lightning.tracking.logger import STEP, tracked, wandb_facts
from rld_lightning.tracking.results import log_models
from rld_lightning.tracking.start import next_step, within_limits

GROUP = "digits-wrn16_1_to_wrn16_1-recipe"  # which Hydra knows better
SECRETS = ("AKIAHIDDEN", "hunter2hunter2", "urlpass77")


def test_hanging_server_makes_the_run_offline_and_prints_how_to_upload_it(finished):
    folder, printed, _ = finished
    told = [line.split("wandb  ", 1)[1] for line in printed.splitlines() if line.startswith("   wandb")]
    assert [line.split("127.0.0.1")[0] for line in told[::2]] == ["offline, because http://"] * 2  # teacher and student
    assert all("does not answer within 0.2 s" in line for line in told[::2])
    (file,) = folder.glob("wandb/offline-run-*")
    assert told[3] == f"upload with: wandb sync {file}"
    assert len(told) == 4
    assert (folder / "summary.json").exists()


def test_history_equals_metrics_csv(finished):
    folder, _, records = finished
    logged = {}
    for record in records:
        if record.HasField("history"):
            row = values(record.history.item)
            step = row.pop(STEP, None)
            logged |= {(step, name): value for name, value in row.items() if "/" in name or name == "lr"}
    table = pd.read_csv(folder / "metrics.csv")
    expected = {
        (row["step"], name): row[name]
        for _, row in table.iterrows()
        for name in table
        if name not in ("epoch", "step") and pd.notna(row[name])
    }
    assert logged == pytest.approx(expected)
    names = {name for _, name in logged}
    assert names >= {"train/grad_norm", "stats/scd_share", "stats/mcd_share", "stats/teacher_wrong", "val/top1"}
    assert names >= {"train/top1_teacher_wrong", "val/top1_teacher_wrong", "val/top1_best", "train/images_per_s"}


def test_configuration_is_nested_and_resolved(finished):
    _, _, records = finished
    (run,) = (record.run for record in records if record.HasField("run"))
    config = values(run.config.update)
    for record in records:
        config |= values(record.config.update)
    assert config["loss"]["beta"] == 8.0
    assert config["model"]["teacher"]["name"] == "wrn16_1"
    assert config["recipe"]["epochs"] == 2
    assert config["dataset"] == "digits"
    assert (run.project, run.run_group, run.job_type) == ("rld-lightning", GROUP, "rld")
    assert run.display_name == f"{GROUP}-rld-seed0"
    assert list(run.tags) == ["digits", "wrn16_1_to_wrn16_1", "rld", "recipe"]


def test_learning_rate_is_logged_every_epoch(finished):
    folder, _, records = finished
    logged = [row["lr"] for row in (values(r.history.item) for r in records if r.HasField("history")) if "lr" in row]
    assert len(logged) == 2
    assert pd.read_csv(folder / "metrics.csv")["lr"].dropna().tolist() == pytest.approx(logged)
    assert logged[1] < logged[0]  # the end of one cycle


def test_other_loggers_get_the_whole_configuration(tmp_path):
    board = TensorBoardLogger(tmp_path, name="", version="tensorboard")
    trainer, module = SimpleNamespace(loggers=[board]), SimpleNamespace(hparams={"student": "a"})
    with tracked(trainer, module, OmegaConf.create({"loss": {"beta": 8.0, "parts": [1, None]}, "seed": None})):
        pass
    board.experiment.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().summary_metadata["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(events.plugin_data.content).session_start_info.hparams
    assert found.keys() == {"student", "loss/beta", "loss/parts", "seed"}
    assert found["loss/beta"].number_value == 8.0


def test_no_file_of_a_run_or_of_wandb_contains_a_secret(finished):
    folder, printed, records = finished
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "last.ckpt", "debug.log"} <= {path.name for path in files}
    assert not [path for path in files if any(secret.encode() in path.read_bytes() for secret in SECRETS)]
    assert not [secret for secret in SECRETS if secret in printed]
    (arguments,) = (r.environment.args for r in records if r.HasField("environment") and r.environment.args)
    assert list(arguments) == [
        "+store.storage_options={key:REDACTED,secret:REDACTED}",
        "+store.url='https://REDACTED@host/x'",
    ]
    config = values(next(record.run for record in records if record.HasField("run")).config.update)
    for record in records:
        config |= values(record.config.update)
    assert config["store"]["storage_options"] == {"key": "REDACTED", "secret": "REDACTED"}


def test_metrics_have_the_trainer_step_and_accuracy_is_summarised_by_best_and_last(finished):
    folder, _, records = finished
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in records if r.HasField("metric")}
    assert metrics["*"].step_metric == metrics["val/top1"].step_metric == STEP
    assert metrics["val/top1"].summary.max
    assert metrics["val/top1"].summary.last
    summary = {}
    for record in records:
        summary |= values(record.summary.update)
    told = json.loads((folder / "summary.json").read_text())
    assert summary["val/top1"] == pytest.approx({"max": told["top1_best"], "last": told["top1"]})


def test_tables(finished):
    folder, _, _ = finished

    def table(name):
        (path,) = folder.glob(f"wandb/offline-run-*/files/media/table/{name}_*.json")
        content = json.loads(path.read_text())
        return pd.DataFrame(content["data"], columns=content["columns"])

    classes = pd.read_csv(folder / "classes.csv")
    assert classes["images"].sum() == 360
    pd.testing.assert_frame_equal(table("classes"), classes, check_dtype=False)
    confusion = table("confusion_table")
    assert confusion["images"].sum() == 360
    right = confusion[confusion["actual"] == confusion["predicted"]].set_index("actual")["images"]
    share = 100 * right.reindex(classes["class"].astype(str)).fillna(0).to_numpy() / classes["images"]
    assert share.tolist() == pytest.approx(classes["accuracy"].tolist(), abs=1e-4)
    examples = table("examples")
    assert len(examples) == 4
    assert list(examples)[:3] == ["image", "label", "distributions"]
    assert not examples["teacher right"][:2].any()  # a teacher of six steps is wrong often enough
    assert {"refined top classes", "student prediction", "teacher p(label)"} <= set(examples)


def test_student_is_an_artifact_and_the_teacher_an_input(finished):
    folder, _, records = finished
    artifacts = {r.artifact.name: r.artifact for r in records if r.HasField("artifact")}
    student, teacher = artifacts[f"{GROUP}-rld"], artifacts["digits-wrn16_1-recipe-ce"]
    assert (student.type, teacher.type) == ("model", "model")
    assert json.loads(student.metadata)["top1"] == json.loads((folder / "summary.json").read_text())["top1"]
    assert {"latest", "last", "seed0", "best"} == set(student.aliases)  # its last epoch was its best
    (content,) = student.manifest.contents
    assert content.local_path == str(folder / "student.safetensors")  # not a copy somewhere else
    assert not student.use_after_commit
    assert teacher.use_after_commit
    paths = [Path(entry.local_path) for a in artifacts.values() for entry in a.manifest.contents if not entry.ref]
    assert len(paths) > 10
    assert all(path.is_file() and path.is_relative_to(folder) for path in paths)  # a copy of the folder has them all
    # Equal content is the same version: the one that the teacher's own run logged.
    own = {r.artifact.name: r.artifact for r in read_run(folder / "teacher") if r.HasField("artifact")}
    assert own["digits-wrn16_1-recipe-ce"].digest == teacher.digest
    assert teacher.manifest.contents[0].ref.startswith("file://")


def test_resumed_run_continues_the_same_wandb_run(finished, train, monkeypatch, tmp_path):
    folder, _, records = finished
    monkeypatch.setenv("WANDB_MODE", "offline")
    weights = f"model.teacher.weights={folder / 'teacher'}"  # of a few batches, so not stored
    killed = (
        tmp_path
        / "run"
        / "wandb"
        / f"offline-run-20200101_000000-{next(r.run.run_id for r in records if r.HasField('run'))}"
    )
    killed.mkdir(parents=True)
    printed = train(tmp_path / "run", weights, "recipe.epochs=2", f"resume={folder / 'last.ckpt'}")
    before, after = (next(r.run for r in file if r.HasField("run")) for file in (records, read_run(tmp_path / "run")))
    assert after.run_id == before.run_id == json.loads((tmp_path / "run" / "wandb_run.json").read_text())["id"]
    assert printed.count("wandb  ") == 1  # the way to upload it, with what an earlier start has left
    assert f"upload with: wandb sync {killed} {killed.parent}/offline-run-" in printed
    used = [
        {r.artifact.digest for r in file if r.artifact.use_after_commit}
        for file in (records, read_run(tmp_path / "run"))
    ]
    assert used[0] == used[1] != set()  # the teacher, by its file or by the directory of its run
    steps = [
        [r.history.step.num for r in file if r.HasField("history")] for file in (records, read_run(tmp_path / "run"))
    ]
    assert steps[0] == list(range(len(steps[0])))
    assert steps[1] == list(range(len(steps[0]), len(steps[0]) + len(steps[1])))


def test_best_and_last_student_are_versions_of_one_artifact(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("wandb", "teacher"))
    last = read_weights(folder / "student.safetensors")
    other = {name: value + 1 for name, value in last.state_dict.items()}
    save_weights(other, folder / "student.safetensors", last.metadata)  # trained on, and got worse
    logged = []
    run = SimpleNamespace(log_artifact=lambda artifact, aliases: logged.append((artifact, aliases)))
    log_models(run, folder, None)
    (best, names), (latest, others) = logged
    assert names == ["best"]
    assert others == ["latest", "last", "seed0"]
    assert best.name == latest.name == f"{GROUP}-rld"
    paths = [artifact.manifest.entries["student.safetensors"].local_path for artifact in (best, latest)]
    kept = read_weights(paths[0])
    assert kept.metadata["wandb_artifact"] == f"{GROUP}-rld"
    assert all((kept.state_dict[name] == value).all() for name, value in last.state_dict.items())
    assert paths[1] == str(folder / "student.safetensors")
    told = json.loads((folder / "summary.json").read_text())
    assert (best.metadata["top1"], latest.metadata["top1"]) == (told["top1_best"], told["top1"])
    assert latest.metadata.keys() - best.metadata.keys() == {"top5", "ce", "agreement"}  # known of the last epoch only


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Creates loggers for a run directory in ``tmp_path``."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    yield lambda **options: WandbLogger(**{"save_dir": tmp_path, "project": "project", **options})
    wandb.teardown()


def test_run_and_project_of_a_sweep_agent_take_precedence(offline, monkeypatch, tmp_path):
    import wandb

    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "trial")
    monkeypatch.setenv("WANDB_PROJECT", "sweeps")
    (tmp_path / "wandb_run.json").write_text('{"id": "another"}')
    parameters = {"loss.alpha": {"value": 0.30298531}, "loss.beta": {"value": 4}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"wandb_version": 1, **parameters}))
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "sweep.yaml"))
    logger = offline(name="name")
    logger.continue_run(tmp_path)
    logger.log_metrics({"val/top1": 1.0}, 1)
    logger.finish(True)
    wandb.teardown()
    *_, run = (record.run for record in read_run(tmp_path) if record.HasField("run"))
    assert (run.run_id, run.project, run.display_name) == ("trial", "sweeps", "name-loss.alpha=0.303,loss.beta=4")


@pytest.mark.parametrize("content", ['{"id": "../../x"}', '{"id": "*"}', '{"id": ["a"]}', "[" * 100_000, "3", None])
def test_invalid_ids_in_a_foreign_directory_are_ignored(offline, tmp_path, content):
    file = tmp_path / "wandb_run.json"
    if content is None:
        os.mkfifo(file)
    else:
        file.write_text(content)
    logger = offline()
    before = logger._wandb_init["id"]
    logger.continue_run(tmp_path)
    assert logger._wandb_init["id"] == before
    assert wandb_facts(tmp_path) == {}


@pytest.mark.parametrize("name", ["8x2k1b3q", "rld-v0.2_seed 1"])
def test_ids_given_by_users_are_continued(offline, tmp_path, name):
    (tmp_path / "wandb_run.json").write_text(f'{{"id": "{name}"}}')
    logger = offline()
    logger.continue_run(tmp_path)
    assert logger._wandb_init["id"] == name


@pytest.mark.parametrize(("share", "artifact"), [(0.0, "a_to_b-rld"), (0.1, "a_to_b-rld-tuning")])
def test_student_with_held_out_images_is_a_separate_artifact(offline, tmp_path, share, artifact):
    logger = offline(artifact="a_to_b-rld")
    module = SimpleNamespace(teacher=None, hparams={})
    trainer = SimpleNamespace(loggers=[logger], is_global_zero=True)
    cfg = {"paths": {"run": str(tmp_path)}, "resume": None, "data": {"val_fraction": share}, "model": {"teacher": None}}
    with console.capture(), tracked(trainer, module, OmegaConf.create(cfg)):
        pass
    assert wandb_facts(tmp_path) == {"wandb_artifact": artifact}


def test_crash_of_wandb_ends_only_its_logging(offline, monkeypatch):
    logger = offline()
    logger.log_metrics({"x": 1.0}, 1)

    def crash(*_arguments):
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(logger.experiment, "log", crash)
    with console.capture() as printed:
        for step in range(3):
            logger.log_metrics({"x": 1.0}, step)
        logger.log_hyperparams({"a": 1})
        logger.finish(True)
    lines = printed.get().splitlines()
    assert len(lines) == 2
    assert "logging stopped, metrics.csv continues: ConnectionResetError: Connection lost" in lines[0]
    assert "upload with: wandb sync" in lines[1]


@pytest.mark.slow
def test_wandb_is_not_imported_unless_used():
    code = "import sys, rld_lightning.tasks.fit, rld_lightning.callbacks; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_directory_without_a_wandb_run_gives_no_facts(tmp_path):
    assert wandb_facts(tmp_path) == {}


LOG = """
import sys
from rld_lightning.tracking import WandbLogger
logger = WandbLogger(save_dir=sys.argv[1], project="project", answer_timeout=60, init_timeout=5, finish_timeout=5)
for step in range(20):
    logger.log_metrics({"x": step}, step)
logger.finish(True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "told"),
    [
        ({"viewer { id }": "late"}, "lets no run start"),
        ({"viewer { id }": "error"}, "lets no run start"),
        ({"UpsertBucket": "late"}, "has not taken everything within 5 s"),
        ({"UpsertBucket": "error"}, "upload with: wandb sync"),
    ],
)
def test_server_that_fails_later_ends_in_time_and_everything_can_be_uploaded(tmp_path, after, told):
    with serving("well", after) as stub:
        environment = {**os.environ, "WANDB_BASE_URL": stub.address, "WANDB_API_KEY": "x" * 40, "no_proxy": "127.0.0.1"}
        del environment["WANDB_MODE"]
        command = [sys.executable, "-c", LOG, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
    sync = Path(done.stdout.rsplit("wandb sync ", 1)[1].strip())
    assert [values(r.history.item)["x"] for r in read_file(*sync.glob("run-*.wandb")) if r.HasField("history")] == list(
        range(20)
    )


@pytest.mark.parametrize(
    "options",
    [{"project": "my/project"}, {"project": "x" * 200}, {"id": "a/b"}, {"mode": "sometimes"}, {"entity": 3}],
)
def test_refusal_by_wandb_is_one_line_and_training_continues(offline, options):
    logger = offline(**options)
    with console.capture() as printed:
        assert hasattr(logger, "experiment")  # as Lightning asks
        for step in range(2):
            logger.log_metrics({"x": 1.0}, step)
        logger.log_hyperparams({"a": 1})
        logger.experiment.watch(None)
        logger.finish(True)
    (line,) = printed.get().splitlines()
    assert "logging stopped, metrics.csv continues: " in line


@pytest.mark.parametrize(
    ("tags", "kept"),
    [
        ("single", ["single"]),
        (["", "a:b", " b ", None, 3, "b"], ["a:b", "b", "3"]),
        (["x" * 70], ["x" * 64]),
        (None, []),
    ],
)
def test_names_and_tags_are_within_the_limits_of_wandb(tags, kept):
    limited = within_limits({"tags": tags, "name": "n" * 200, "group": "g", "job_type": "j" * 200})
    assert limited == {"tags": kept, "name": "n" * 128, "group": "g", "job_type": "j" * 64}


def test_pipes_among_the_files_of_a_copied_run_are_not_read(tmp_path):
    folder = tmp_path / "wandb" / "offline-run-20200101_000000-copied"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "run-copied.wandb")
    assert next_step(tmp_path, "copied") == 0
