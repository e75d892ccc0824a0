"""Sweeps: tuned on held-out images, resumed, and summarised."""

import pickle
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.configs import compose
from helpers.run_factory import write_run
from helpers.sweeps import begin_sweep
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import OmegaConf

from rld_lightning.callbacks import OptunaPruner
from rld_lightning.distributed import Launcher, rank_zero_only
from rld_lightning.errors import UserError
from rld_lightning.hydra.compose import expand_combined_loss
from rld_lightning.reporting.sweeps import sweep_settings
from rld_lightning.runs import folder as run_folder
from rld_lightning.runs.folder import locked
from rld_lightning.tasks import fit as fitting
from rld_lightning.tasks.sweep import callback as sweep
from rld_lightning.tasks.sweep.callback import Sweep
from rld_lightning.tasks.sweep.swept_values import overrides_of
from rld_lightning.tasks.sweep.trial_tables import HELD_OUT, _trials, retrain_command
from rld_lightning.tasks.trial import run_trial


@pytest.fixture
def start(tmp_path):
    """Starts a sweep with a command line, and returns its configuration."""
    return lambda *command: begin_sweep(*command, f"hydra.sweep.dir={tmp_path / 'sweep'}")[0]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("command", "share"),
    [
        (["loss.alpha=1,2"], 0.1),
        (["loss=rld,dkd", "seed=0,1"], 0.1),
        (["sweep=rld_grid"], 0.1),
        (["seed=0,1,2"], None),  # repetitions tune nothing
        (["loss.alpha=1,2", "data.val_fraction=0.2"], None),  # the user's own
        (["data.val_fraction=0.1,0.2"], None),
        (["loss=rld,dkd", "data.val_fraction=0"], None),  # a comparison, as the literature has it
    ],
)
def test_tuning_is_validated_on_held_out_images(start, command, share):
    added = set(start(*command).hydra.overrides.task) - set(command)
    assert added == ({f"{HELD_OUT}={share}"} if share else set())


def test_tuning_on_the_test_split_is_refused(start, capsys):
    with pytest.raises(SystemExit, match="2"):
        start("loss.alpha=1,2", "data.val_fraction=0")
    assert "error: data.val_fraction=0 would tune loss.alpha on the test split; omit it" in capsys.readouterr().out


def test_optuna_does_not_choose_seeds(start, capsys):
    pytest.importorskip("optuna")
    with pytest.raises(SystemExit, match="2"):
        start("sweep=rld_optuna", "seed=0,1,2")
    assert "Optuna would choose the luckiest seed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["sweep=rld_optuna", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0 must be a whole number from 1 on"),
        (["sweep=rld_optuna", "hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs=0 must be"),
        (["sweep=rld_optuna", "hydra.sweeper.direction=up"], "must be maximize or minimize"),
        (["sweep=rld_optuna", "loss.gama=interval(1,2)"], "loss.gama is not known (--help lists"),
        (["loss=ce,rld", "loss.alpha=2"], "loss.alpha is not known with loss=ce (--help lists"),
        (["loss.alpha=interval(1,2)"], "loss.alpha=interval(1,2) has no list of values"),
    ],
)
def test_impossible_sweep_ends_in_one_sentence_before_training(start, capsys, command, sentence):
    pytest.importorskip("optuna")
    with pytest.raises(SystemExit, match="2"):
        start(*command)
    output = capsys.readouterr().out
    assert output.startswith("error: ")
    assert sentence in " ".join(output.split())


def test_any_error_at_the_start_ends_the_sweep(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "refuse_another_sweep", lambda *_args, **_options: 1 / 0)
    with pytest.raises(SystemExit, match="2"):  # of anything else Hydra would make a warning
        start("loss.alpha=1,2")
    assert f"error: the sweep in {tmp_path / 'sweep'} ends: ZeroDivisionError" in capsys.readouterr().out


PAIR = ["model=pair", "model.teacher.name=resnet14", "model.student.name=resnet8", "model.teacher.weights=fit"]


@pytest.fixture
def teachers(monkeypatch):
    """Records the configurations of the teachers that sweeps train, instead of training them."""
    asked = []

    def fit(cfg, resume_hint):
        folder = Path(cfg.paths.run)
        assert resume_hint == f"hydra.sweep.dir={folder.parent}"
        folder.mkdir(parents=True, exist_ok=True)
        asked.append(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))
        return SimpleNamespace(steps=10, complete=False)

    monkeypatch.setattr(sweep, "fit_in_processes", fit)
    return asked


def test_teacher_of_all_trials_is_trained_first(start, teachers, tmp_path):
    pair = [*PAIR, f"paths.teachers={tmp_path / 'store'}", "seed=3"]
    folder = tmp_path / "sweep" / "teacher"
    for _ in range(2):  # when it goes on, the same
        added = start("loss.alpha=1,2", *pair).hydra.overrides.task[-1]
        assert added == f"model.teacher.weights={folder / 'student.safetensors'}"
    assert teachers[0] == teachers[1]
    (cfg, _) = teachers
    assert (cfg.model.student.name, cfg.model.teacher, cfg.model.label, cfg.seed) == ("resnet14", None, "resnet14", 3)
    assert (cfg.loss._target_, cfg.method, cfg.paths.run) == ("rld_lightning.losses.CELoss", "ce", str(folder))
    assert cfg.data.val_fraction == 0.1  # held out for the trials
    stored = tmp_path / "store" / "cifar100" / "resnet14.safetensors"
    stored.parent.mkdir(parents=True)
    stored.touch()
    shutil.rmtree(tmp_path / "sweep")
    start("loss.alpha=1,2", *pair)
    assert len(teachers) == 2  # it is there


@pytest.mark.parametrize("seed", ["${oc.env:HOME}", "[7]", "true"])
def test_seed_of_an_interrupted_teacher_is_a_number_and_not_resolved(start, teachers, tmp_path, capsys, seed):
    (tmp_path / "sweep" / "teacher").mkdir(parents=True)
    (tmp_path / "sweep" / "teacher" / "config.yaml").write_text(f"seed: {seed}\nmodel: {{}}\n")
    with pytest.raises(SystemExit, match="2"):
        start(*PAIR, "loss=kd,rld", "seed=1,2")
    assert "its seed is no number" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("varied", ["model.student.name=resnet8,resnet20", "recipe.optimizer.lr=0.05,0.1"])
def test_students_of_several_kinds_share_a_teacher(start, teachers, tmp_path, varied):
    start(*PAIR, varied, "loss=kd,rld", "seed=0,1", f"paths.teachers={tmp_path}")
    assert [cfg.model.student.name for cfg in teachers] == ["resnet14"]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "varied",
    [
        "model.teacher.name=resnet14,resnet20",
        "data=digits,cifar100",
        "recipe=quick,cifar240",
        "experiment=reversed,quickstart",
    ],
)
def test_trials_that_need_their_own_teachers_get_none(start, teachers, tmp_path, varied):
    start(*PAIR, varied, f"paths.teachers={tmp_path}")
    assert not teachers


def test_teacher_is_trained_like_the_trials_without_a_pruner(start, teachers, tmp_path):
    pytest.importorskip("optuna")
    pruner = ["sweep=rld_optuna", "callbacks.pruner.pruner.n_warmup_steps=5"]
    start(*pruner, "experiment=quickstart", "logger=wandb", f"paths.teachers={tmp_path}")
    (cfg,) = teachers
    assert (cfg.data._target_, cfg.recipe.epochs) == ("rld_lightning.data.DigitsDataModule", 15)
    assert cfg.model.student.name == "wrn16_2"
    assert {"checkpoint_last", "wandb_examples"} < set(cfg.callbacks)
    assert "pruner" not in cfg.callbacks


def test_stored_teacher_is_found_by_the_name_of_its_data(start, teachers, tmp_path):
    stored = tmp_path / "photos" / "resnet14.safetensors"
    stored.parent.mkdir()
    stored.touch()
    start("loss.alpha=1,2", *PAIR, "data=imagefolder", f"data.root={stored.parent}", f"paths.teachers={tmp_path}")
    assert not teachers


def test_trials_are_named_after_swept_values(start):
    (rule,) = (o for o in start("loss.alpha=1,2", "recipe=quick").hydra.overrides.hydra if "exclude_keys" in o)
    assert rule.endswith('.exclude_keys=["recipe","data.val_fraction"]')


def test_directory_refuses_trials_of_another_sweep(start, capsys):
    start("loss.alpha=1,2", "recipe=quick")
    start("loss.alpha=1,2,4", "recipe=quick", "launcher=joblib", "print_config=false")  # more values of the same
    with pytest.raises(SystemExit, match="2"):
        start("loss.alpha=1,2", "recipe=cifar240")
    assert "they differ in recipe=cifar240, recipe=quick." in capsys.readouterr().out


def test_path_of_a_teacher_file_is_normalised(start, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teachers").mkdir()
    (tmp_path / "teachers" / "t.pth").touch()
    start("loss.alpha=1,2", "model.teacher.weights=teachers/t.pth")
    start("loss.alpha=1,2", f"model.teacher.weights={Path('teachers/t.pth').absolute()}")


def test_directory_is_locked_by_a_running_sweep(start, tmp_path, capsys, monkeypatch):
    optuna = pytest.importorskip("optuna")
    first = Sweep(held_out=0.1)
    first._lock = run_folder.lock_folder(tmp_path / "sweep", ".sweep.lock", "swept")
    pickle.loads(pickle.dumps(first))  # as launchers do, for the processes of trials
    study = optuna.create_study(study_name="fit", storage=f"sqlite:///{tmp_path / 'sweep' / 'study.db'}")
    study.ask()
    with pytest.raises(SystemExit, match="2"):
        start("sweep=rld_optuna", "hydra.sweeper.study_name=fit")
    assert f"error: {tmp_path / 'sweep'} is being swept in by another process; wait for it" in capsys.readouterr().out
    assert study.trials[0].state == optuna.trial.TrialState.RUNNING
    del first
    start("loss.alpha=1,2")


def trials(folder, values):
    for alpha, seed, top1 in values:
        path = write_run(
            folder / f"loss.alpha={alpha},seed={seed}",
            seed=seed,
            top1=top1,
            settings={"loss.alpha": alpha},
            held_out=0.1,
        )
        overrides = [f"loss.alpha={alpha}", f"seed={seed}", "recipe=quick"]
        OmegaConf.save(OmegaConf.create(overrides), path / ".hydra" / "overrides.yaml")


VALUES = [(1, 0, 50.0), (1, 1, 54.0), (2, 0, 51.0), (2, 1, 52.0), (4, 0, 10.0)]


def test_trials_of_nested_sweeps_and_networks_trained_first_do_not_count(tmp_path):
    trials(tmp_path, VALUES)
    trials(tmp_path / "inner", VALUES)  # a sweep of its own
    (tmp_path / "inner" / "sweep.yaml").touch()
    for name in ("teacher", "alone"):
        write_run(tmp_path / name, "ce", teacher=None)
    assert {run.folder.parent for run in _trials(tmp_path)} == {tmp_path}
    assert {run.folder.name for run in _trials(tmp_path)} == {f"loss.alpha={a},seed={s}" for a, s, _ in VALUES}
    settings = sweep_settings(_trials(tmp_path), ["loss.alpha", "seed"])
    assert list(settings["overrides"]) == [("loss.alpha=1",), ("loss.alpha=2",), ("loss.alpha=4",)]
    assert list(settings["n"]) == [2, 2, 1]


def best_command(config, swept):
    """Returns the command that trains with the single setting of a sweep."""
    settings = sweep_settings(_trials(Path(config.hydra.sweep.dir)), swept)
    ((overrides, run),) = zip(settings["overrides"], settings["run"], strict=True)
    return retrain_command(config, overrides, run, overrides_of(config)[1])


def test_last_line_has_best_setting_score_and_final_command(start, tmp_path, capsys):
    secret = "+store.secret=hunter2hunter2"
    config = start("loss.alpha=1,2,4", "seed=0,1", "recipe=quick", "launcher=joblib", "loss=rld_ls", secret)
    trials(tmp_path / "sweep", VALUES)
    (tmp_path / "sweep" / "loss.alpha=4,seed=1").mkdir()
    (tmp_path / "sweep" / "loss.alpha=4,seed=1" / "error.txt").write_text("out of memory\n")
    with pytest.raises(SystemExit, match="1"):  # for one has failed
        Sweep(0.1).on_multirun_end(config)
    *before, best, _, command = capsys.readouterr().out.strip().splitlines()
    assert any("loss.alpha=4,seed=1: out of memory" in line for line in before)
    assert best.split("loss.alpha=1: ")[1].startswith("52.00 ± 2.83 % on ")
    assert best.endswith("n = 2")
    assert command == (
        f"python {sys.argv[0]} recipe=quick loss=rld_ls +store.secret=REDACTED loss.alpha=1 data.val_fraction=0 "
        "trainer.check_val_every_n_epoch=30"
    )
    overrides = command.split()[2:]
    assert compose(*overrides).data.val_fraction == 0


def test_settings_measured_on_different_images_have_no_best(start, tmp_path, capsys):
    config = start("data.val_fraction=0.1,0.2", "seed=0,1")
    for share, images in ((0.1, 5000), (0.2, 10000)):
        for seed in (0, 1):
            path = write_run(
                tmp_path / "sweep" / f"{share},{seed}", seed=seed, top1=60 - 10 * share + seed, held_out=share,
                summary={"images": images, "split_images": images},
            )  # fmt: skip
            OmegaConf.save([f"data.val_fraction={share}", f"seed={seed}"], path / ".hydra" / "overrides.yaml")
    capsys.readouterr()
    Sweep(0.1).on_multirun_end(config)
    printed = capsys.readouterr().out
    title, table = " ".join(printed.split("┏")[0].split()), " ".join(re.sub("[│┃]", " ", printed).split())
    assert title.startswith("2 settings on different images, which do not compare, the highest first; mean ± standard ")
    for words in ("59.50 ± 0.71", "58.50 ± 0.71", "cifar100, 5,000", "cifar100, 10,000"):
        assert words in table
    assert not re.search(r"^ *(best|next) ", printed, re.MULTILINE)


def test_command_names_the_loss_that_the_sweep_has_chosen(start, tmp_path):
    config = start("sweep=rld_grid", "model=vgg13_to_vgg8")
    trials(tmp_path / "sweep", VALUES[:1])
    assert "model=vgg13_to_vgg8 loss=rld loss.alpha=1 " in best_command(config, ["loss.alpha"])


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("command", "value", "printed"),
    [
        (["loss=[rld,at]"], "loss.rld.alpha=2", "'loss=[rld,at]' loss.rld.alpha=2 "),
        (["loss.weights.at=0.5", "loss=[rld,at]"], "loss.rld.alpha=2", "loss.weights.at=0.5 'loss=[rld,at]' "),
        (["loss=[rld,at]"], "loss.weights.at=2", "'loss=[rld,at]' loss.weights.at=2 "),
        (["experiment=rld_crd"], "loss.rld.alpha=2", "experiment=rld_crd loss=combined loss.rld.alpha=2 "),
        (
            ["+loss@loss.mine=rld", "+loss@loss.at=at", "loss=combined"],
            "loss.mine.alpha=2",
            "+loss@loss.mine=rld +loss@",
        ),
    ],
)
def test_command_for_a_combined_loss_composes_to_the_trial(start, tmp_path, command, value, printed):
    key, tried = value.split("=")
    expanded = expand_combined_loss([*command, f"{key}=1,{tried}"])
    config = start(*expanded)
    (rule,) = (o for o in config.hydra.overrides.hydra if "exclude_keys" in o)
    assert "@" not in rule
    run = write_run(tmp_path / "sweep" / value, settings={}, held_out=0.1)
    trial_overrides = [*(o for o in expanded if "," not in o), value]
    OmegaConf.save(OmegaConf.create(trial_overrides), run / ".hydra" / "overrides.yaml")
    line = best_command(config, overrides_of(config)[0])
    assert printed in line
    assert compose(*shlex.split(line)[2:]).loss == compose(*trial_overrides).loss


def test_swept_loss_is_named_once(start, tmp_path):
    config = start("loss=rld,dkd", "recipe=quick")
    run = write_run(tmp_path / "sweep" / "loss=dkd", "dkd", held_out=0.1)
    OmegaConf.save(OmegaConf.create(["loss=dkd", "recipe=quick"]), run / ".hydra" / "overrides.yaml")
    assert " recipe=quick loss=dkd data.val_fraction=0 " in best_command(config, ["loss"])


def test_pruner_reports_each_epoch_and_stops_a_bad_trial(tmp_path):
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(study_name="fit", storage=storage, direction="maximize")

    def begin():
        asked = study.ask()
        value = asked.suggest_float("loss.alpha", 0, 1)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0)
        callback = OptunaPruner(storage, "fit", [f"loss.alpha={value}", "recipe=quick"], pruner)
        trainer = SimpleNamespace(
            is_global_zero=True, sanity_checking=False, state=SimpleNamespace(fn=TrainerFn.FITTING), should_stop=False,
            strategy=SimpleNamespace(broadcast=lambda value: value), current_epoch=0, callback_metrics={},
        )  # fmt: skip
        callback.on_fit_start(trainer, None)
        return asked, callback, trainer

    def epoch(callback, trainer, top1):
        trainer.callback_metrics["val/top1"] = top1
        callback.on_validation_end(trainer, None)
        trainer.current_epoch += 1

    asked, callback, trainer = begin()
    for top1 in (30.0, 50.0):
        epoch(callback, trainer, top1)
    assert not trainer.should_stop
    study.tell(asked, 50.0)
    reported = optuna.load_study(study_name="fit", storage=storage).trials[0]
    assert reported.intermediate_values == {1: 30.0, 2: 50.0}

    _, callback, trainer = begin()
    epoch(callback, trainer, 31.0)
    assert not trainer.should_stop
    epoch(callback, trainer, 49.0)
    assert trainer.should_stop

    stranger = OptunaPruner(storage, "fit", ["loss.alpha=7"], optuna.pruners.NopPruner())
    with pytest.raises(ValueError, match="no running trial of the study fit"):
        stranger.on_fit_start(trainer, None)


@pytest.fixture
def cfg(tmp_path):
    return compose("data=digits", "model=resnet8", "loss=ce", f"paths.run={tmp_path / 'trial'}", resolve=False)


def finish(cfg, top1=60.0):
    folder = write_run(Path(cfg.paths.run), "ce", teacher=None, student="resnet8", top1=top1)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    return folder


def test_finished_trial_is_not_repeated(cfg, monkeypatch):
    finish(cfg)
    monkeypatch.setattr(fitting, "run_in_processes", lambda *_: pytest.fail("it was started again"))
    assert run_trial(cfg).top1 == 60.0


def test_interrupted_trial_is_resumed_and_a_failed_one_reports_why(cfg, monkeypatch):
    folder = finish(cfg)
    (folder / "summary.json").unlink()
    (folder / "last.ckpt").touch()
    resumed = []

    def fails(_processes, _task, cfg, **_):
        resumed.append(cfg.resume)
        raise UserError("out of memory.")

    monkeypatch.setattr(fitting, "run_in_processes", fails)
    with pytest.raises(UserError, match="out of memory"):
        run_trial(cfg)
    assert (folder / "error.txt").read_text() == "out of memory.\n"
    monkeypatch.setattr(fitting, "run_in_processes", lambda _processes, _task, cfg, **_: finish(cfg, 70.0))
    assert run_trial(cfg).top1 == 70.0
    assert not (folder / "error.txt").exists()
    assert resumed == [str(folder / "last.ckpt")]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_of_a_slurm_job_resumes_and_returns_the_summary(cfg, monkeypatch, rank):
    monkeypatch.setattr(fitting, "external_launcher", lambda: Launcher("srun", 2, 1))
    monkeypatch.setattr(run_folder, "external_launcher", lambda: Launcher("srun", 2, 1))
    monkeypatch.setattr(fitting, "processes_to_start", lambda _trainer: 1)
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    resumed = []
    summary = SimpleNamespace(top1=60.0)  # rank 0 may not have written it yet
    monkeypatch.setattr(fitting, "fit", lambda cfg: resumed.append(cfg.resume) or summary)
    folder = Path(cfg.paths.run)
    folder.mkdir()
    (folder / "error.txt").touch()
    (folder / "metrics.csv").touch()
    assert run_trial(cfg) is summary
    assert (folder / "metrics.csv").exists() == (folder / "error.txt").exists() == (rank == 1)
    (folder / "last.ckpt").touch()
    run_trial(cfg)
    assert resumed == [None, str(folder / "last.ckpt")]


def test_path_of_a_teacher_file_may_be_written_differently(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = ["data=digits", "model=pair", "model.teacher.name=resnet14", "model.student.name=resnet8", "loss=kd"]
    written = [
        compose(*pair, f"model.teacher.weights={weights}", f"paths.run={tmp_path / 'trial'}", resolve=False)
        for weights in ("t.safetensors", tmp_path / "t.safetensors", "fit", "other.safetensors")
    ]
    finish(written[0])
    assert [run_trial(cfg).top1 for cfg in written[:3]] == [60.0] * 3
    with pytest.raises(UserError, match=r"model\.teacher\.weights"):
        run_trial(written[3])


def test_two_processes_do_not_train_in_one_directory(cfg):
    with locked(Path(cfg.paths.run)), pytest.raises(UserError, match="is being trained in by another process"):
        run_trial(cfg)
    assert not (Path(cfg.paths.run) / "error.txt").exists()


def test_directory_with_other_settings_is_left_unchanged(cfg):
    folder = finish(cfg)
    cfg.recipe.optimizer.lr = 0.7
    with pytest.raises(UserError, match=r"holds a run with recipe\.optimizer\.lr=0\.05, and this one has .*lr=0\.7"):
        run_trial(cfg)
    assert not (folder / "error.txt").exists()


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["model=pair", "model.teacher.name=resnet8", "model.student.name=resnet8,resnet9x"], "resnet9x"),
        (
            ["model=resnet8", "loss=ce", "seed=0,1", "resume=/dev/null/nowhere/run"],
            "resume=/dev/null/nowhere/run does not exist",
        ),
        (
            ["loss.alpha=1,2", "model.teacher.weights=/dev/null/nowhere/teacher.pth"],
            "weights file at /dev/null/nowhere/teacher.pth",
        ),
        (
            ["loss.alpha=1,2", "data=imagefolder", "data.root=/dev/null/nowhere/photos"],
            "/dev/null/nowhere/photos is not a folder",
        ),
        (["seed=0,1", "data.root={tmp_path}", "data.url=file:///nowhere.tar.gz"], "Downloading file:///nowhere.tar.gz"),
    ],
)
def test_error_of_every_trial_is_raised_before_the_first(start, tmp_path, capsys, command, sentence):
    with pytest.raises(SystemExit):
        start(*(option.format(tmp_path=tmp_path) for option in command))
    assert sentence in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "sweep").exists()
