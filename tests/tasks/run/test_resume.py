"""What a run may resume from, and what a trainer must support."""

import pytest
import torch
from helpers.plans import make_plan
from omegaconf import OmegaConf

from rld_lightning.models.registry import canonical_name
from rld_lightning.runs.checkpoint import RunRecord, add_record
from rld_lightning.runs.settings import settings
from rld_lightning.tasks.run.checks import check_start
from rld_lightning.tasks.run.plan import Student
from rld_lightning.tasks.run.resume import check_folder, check_resume, find_checkpoint

CONFIG = {
    "seed": 0,
    "model": {"teacher": None, "student": {"name": "resnet8", "weights": None}},
    "recipe": {"epochs": 3, "optimizer": {"lr": 0.1, "momentum": 0.9}},
    "trainer": {"max_epochs": "${recipe.epochs}"},
    "resume": None,
}
CHECKPOINT = {
    "pytorch-lightning_version": "2.6.6",
    "optimizer_states": [{}],
    "lr_schedulers": [],
    "hyper_parameters": {"student": "resnet8"},
}


@pytest.fixture
def run(tmp_path):
    """Writes an interrupted run; calls ``check_resume`` with changes to its configuration."""

    def check(changes=(), checkpoint=None, file="last.ckpt"):
        OmegaConf.save(OmegaConf.create(CONFIG), tmp_path / "config.yaml", resolve=True)
        torch.save(with_settings() | (checkpoint or {}), tmp_path / "last.ckpt")
        (tmp_path / "student.safetensors").write_bytes(b"no pickle")
        cfg = OmegaConf.merge(CONFIG, OmegaConf.from_dotlist(list(changes)), {"resume": str(tmp_path / file)})
        check_resume(tmp_path / file, cfg.model.student.name, cfg)

    return check


def test_equal_settings_with_other_paths_and_lengths_are_accepted(run):
    run()
    run(["recipe.epochs=5", "paths.runs=/elsewhere", "trainer.devices=2"])


def test_remedies_for_a_diverged_run_are_accepted(run):
    run(["recipe.optimizer.lr=0.01", "trainer.gradient_clip_val=1"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"changes": ["recipe.optimizer.momentum=0.5"]},
            "optimizer.momentum=0.9, and this one has .*momentum=0.5",
        ),
        ({"changes": ["model.student.name=resnet14"]}, "is of a run with resnet8, and this one trains resnet14"),
        # a one-cycle schedule ends where it was told to
        ({"changes": ["recipe.epochs=5"], "checkpoint": {"lr_schedulers": [{"total_steps": 9}]}}, "recipe.epochs=3"),
        ({"checkpoint": {"lr_schedulers": None}}, "is not a checkpoint to resume from; take a run's last.ckpt"),
        ({"checkpoint": {"pytorch-lightning_version": "x"}}, "is not a checkpoint to resume from"),
        ({"checkpoint": {"hyper_parameters": {"student": "a\n" * 9}}}, "last.ckpt says name="),
        ({"checkpoint": {"hyper_parameters": {"data_seed": {"_target_": "os.getcwd"}}}}, "last.ckpt says data_seed="),
        ({"checkpoint": {"optimizer_states": []}}, "has only weights.*model.student.weights="),
        ({"file": "student.safetensors"}, "is not a checkpoint to resume from; take a run's last.ckpt"),
    ],
)
def test_invalid_checkpoints_are_refused(run, options, words):
    with pytest.raises(ValueError, match=words):
        run(**options)


NAMES = ["resnet8", "resnet8@24", "my.nets:small@24", "timm/resnet18@224", "transformers/me/vit@a@32", "ResNet8@24"]


@pytest.mark.parametrize("behind", ["", "@resnet14", "@resnet14@32", "@timm/resnet18"])
@pytest.mark.parametrize("student", NAMES)
def test_student_is_recognised_by_the_beginning_of_its_name(run, student, behind):
    own = [f"model.student.name={student}"]
    run(own, {"hyper_parameters": {"student": student + behind}} | told_of(student))


@pytest.mark.parametrize(
    ("before", "now"), [("resnet8@24", "resnet8"), ("resnet8", "resnet8@24"), ("resnet8@24", "resnet8@2")]
)
def test_another_size_is_another_student(run, before, now):
    with pytest.raises(ValueError, match=f"is of a run with {before}, and this one trains {now}"):
        run([f"model.student.name={now}"], {"hyper_parameters": {"student": before}} | told_of(now))


def told_of(student):
    """Returns the facts that a checkpoint records about its student."""
    return {
        key: value
        for key, value in with_settings(model__student__name=canonical_name(student)).items()
        if key not in CHECKPOINT
    }


def with_settings(**changes):
    """Returns a checkpoint with the settings of its run."""
    before = RunRecord(
        settings(OmegaConf.to_container(OmegaConf.create(CONFIG), resolve=True)), changes.pop("sha256", None)
    )
    before.settings.update({key.replace("__", "."): value for key, value in changes.items()})
    add_record(checkpoint := dict(CHECKPOINT), before)
    return checkpoint


@pytest.fixture
def moved(tmp_path):
    """Calls ``check_resume`` for a checkpoint outside any run directory."""

    def check(checkpoint, changes=()):
        torch.save(checkpoint, tmp_path / "last.ckpt")
        cfg = OmegaConf.merge(CONFIG, OmegaConf.from_dotlist(list(changes)))
        return check_resume(tmp_path / "last.ckpt", cfg.model.student.name, cfg)

    return check


def test_moved_checkpoint_contains_its_settings(moved):
    assert moved(with_settings(sha256="ab")).teacher_sha256 == "ab"
    moved(with_settings(), ["recipe.epochs=5", "paths.runs=/elsewhere"])
    with pytest.raises(ValueError, match=r"last\.ckpt is of a run with seed=0, and this one has seed=5"):
        moved(with_settings(), ["seed=5"])


def test_settings_in_the_checkpoint_count_not_those_beside_it(run, tmp_path):
    with pytest.raises(ValueError, match="seed=7, and this one has seed=0"):
        run(checkpoint=with_settings(seed="7"))


def test_teacher_with_a_known_checksum_may_be_moved(moved):
    changes = ["model.teacher.name=resnet14", "model.teacher.weights=/b/teacher.pth"]
    before = {"model__teacher__name": "resnet14", "model__teacher__weights": "/a/teacher.pth"}
    moved(with_settings(**before, sha256="ab"), changes)
    moved(with_settings(**before), [*changes, "model.teacher.weights=fit"])
    with pytest.raises(ValueError, match=r"weights=/a/teacher\.pth, and this one has .*=/b/teacher\.pth"):
        moved(with_settings(**before), changes)


@pytest.mark.parametrize(
    "said",
    [None, [], "x", {}, {"settings": []}, {"settings": {"a": {"_target_": "os.getcwd"}}}, {"settings": {1: "a"}},
     {"settings": {}, "teacher_sha256": ["x"]}],
    ids=str,
)  # fmt: skip
def test_settings_that_are_not_plain_text_are_refused(moved, said):
    with pytest.raises(ValueError, match="does not describe its run in plain text"):
        moved(CHECKPOINT | {"rld_lightning": said})


def test_strange_values_are_escaped_in_messages(moved):
    with pytest.raises(ValueError, match=r"seed='\\x1b\[2J0+', and this one has seed=0") as caught:
        moved(with_settings(seed="\x1b[2J" + "0" * 5000))
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("values", [None, [], "resnet8", {}])
def test_checkpoint_without_a_record_is_accepted(run, values):
    run(checkpoint={"hyper_parameters": values})


def test_student_of_simkd_is_recognised_by_its_own_part(run):
    run(checkpoint={"hyper_parameters": {"student": "resnet8@resnet20"}})


def test_network_that_cannot_be_built_without_memory_is_accepted(tmp_path):
    def begin(name):
        student = Student(name, None, channels_last=True)
        check_start(make_plan(tmp_path, student=student, teacher=None), OmegaConf.create({"resume": None}))

    begin("torchvision/regnet_y_400mf")
    with pytest.raises(ValueError, match="regnet_y_400mf"):
        begin("torchvision/regnet_y_401mf")


@pytest.mark.parametrize("named", ["last.ckpt", ""])
@pytest.mark.parametrize("left", ["config.yaml", ".hydra/config.yaml", "metrics.csv", "teacher/config.yaml"])
def test_run_without_a_checkpoint_starts_over(tmp_path, capsys, named, left):
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).touch()
    given = str(tmp_path / named)
    assert find_checkpoint(given) is None
    check_folder(tmp_path, None, given)
    assert f"there is no checkpoint in {tmp_path} yet: the run starts over\n" in capsys.readouterr().out
    assert not (tmp_path / "metrics.csv").exists()
    check_folder(tmp_path / "new", None, given)  # which takes nothing from there
    assert ("but its teacher resumes with" in capsys.readouterr().out) is ("teacher" in left)


def test_checkpoint_to_resume_from(tmp_path):
    assert find_checkpoint(None) is None
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "last.ckpt")  # where no run is
    assert find_checkpoint("/dev/null/nowhere") == "/dev/null/nowhere"
    (tmp_path / "config.yaml").touch()
    assert find_checkpoint(str(tmp_path / "best.ckpt")) == str(tmp_path / "best.ckpt")
    for there in ("last.previous.ckpt", "last.ckpt"):
        (tmp_path / there).touch()
        assert find_checkpoint(str(tmp_path)) == find_checkpoint(f"{tmp_path}/last.ckpt") == f"{tmp_path}/last.ckpt"
        check_folder(tmp_path, find_checkpoint(str(tmp_path)), str(tmp_path))
    with pytest.raises(ValueError, match=f"holds a run already.*continue it \\(resume={tmp_path}\\)"):
        check_folder(tmp_path, None, None)


def test_finished_run_without_a_checkpoint_is_not_restarted(tmp_path):
    for name in ("config.yaml", "summary.json"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"has ended and left no last\.ckpt"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "schedules", [[{"total_steps": 9}], [{"last_epoch": 1}, {"_schedulers": [{"T_max": 3}, {"total_steps": 9}]}]]
)
@pytest.mark.parametrize("change", ["recipe.epochs=5", "trainer.max_steps=9"])
def test_schedule_with_a_fixed_length_is_why_a_run_cannot_be_longer(run, schedules, change):
    with pytest.raises(ValueError, match=r"its schedule depends on the length of the run.*recipe=cifar240"):
        run([change], {"lr_schedulers": schedules})
    with pytest.raises(ValueError, match=r"the recipe's trainer\.max_epochs, .* Leave trainer\.max_epochs out;"):
        run(["trainer.max_epochs=5"], {"lr_schedulers": schedules})
    run([change], {"lr_schedulers": [{"milestones": {}}]})
    run(["trainer.max_time=00:00:00:09"], {"lr_schedulers": schedules})
