"""Optuna studies: search space, resuming, reporting results."""

from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from rld_lightning.errors import UserError
from rld_lightning.hydra.options import _SAMPLERS, _SWEEPERS
from rld_lightning.hydra.sweeps.optuna_study import open_study, search_space
from rld_lightning.hydra.sweeps.sweepers import sweep_study

optuna = pytest.importorskip("optuna")
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

SPACE = {"x": FloatDistribution(0, 4)}


@pytest.fixture
def kept(monkeypatch):
    """An in-memory storage for studies: creating an SQLite file takes a second."""
    storage, create = optuna.storages.InMemoryStorage(), optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **options: create(**{**options, "storage": storage}))
    return storage


def options(storage=None, sampler="tpe", **others):
    own = {"study_name": "fit", "storage": storage, "sampler": {**_SAMPLERS[sampler], "seed": 3}}
    return OmegaConf.create({**_SWEEPERS["optuna"], **own, **others})


@pytest.mark.parametrize(
    ("line", "distribution"),
    [
        ("x=choice(true,1,0.5,text)", CategoricalDistribution([True, 1, 0.5, "text"])),
        ("x=a,'b c'", CategoricalDistribution(["a", "'b c'"])),
        ("x=choice([1,2],{a:1})", CategoricalDistribution(["[1,2]", "{a:1}"])),
        ("x=range(16,64,step=16)", IntDistribution(16, 48, step=16)),  # without the end, as in a grid
        ("x=range(3)", IntDistribution(0, 2)),
        ("x=range(0.5,2.0,step=0.5)", FloatDistribution(0.5, 1.5, step=0.5)),
        ("x=range(4,1,step=-1)", IntDistribution(2, 4)),
        ("x=range(1,2)", CategoricalDistribution([1])),
        ("x=interval(1,8)", FloatDistribution(1, 8)),
        ("x=interval(1.0,8)", FloatDistribution(1, 8)),
        ("x=int(interval(1,8))", IntDistribution(1, 8)),
        ("x=tag(log, int(interval(1,8)))", IntDistribution(1, 8, log=True)),
        ("x=tag(log, interval(0.001,0.1))", FloatDistribution(0.001, 0.1, log=True)),
    ],
)
def test_distributions_of_overrides(line, distribution):
    assert search_space([line, "y=1", "~z"]) == ({"x": distribution}, ("y=1", "~z"))


def test_the_last_override_of_a_key_counts():
    assert search_space(["x=choice(1,2)", "x=3"]) == ({}, ("x=3",))


def test_categories_print_as_overrides():
    line = "x=true,1,0.5,null,text,'b c',[1,2],{a:1},'1'"
    parse = OverridesParser.create().parse_override
    ((_, distribution),) = search_space([line])[0].items()
    values = [parse(f"x={choice}").value() for choice in distribution.choices]
    assert values == [True, 1, 0.5, None, "text", "b c", [1, 2], {"a": 1}, "1"]


@pytest.mark.parametrize("line", ["x=tag(log, interval(0,1))", "x=interval(2,1)"])
def test_invalid_intervals_raise(line):
    with pytest.raises(ValueError, match="is not an interval"):
        search_space([line])


def test_a_study_is_resumed(tmp_path):
    own = options(f"sqlite:///{tmp_path / 'study.db'}", n_trials=10)
    study, to_go = open_study(own, SPACE)
    assert to_go == 10
    proposed = [study.ask(SPACE) for _ in range(4)]
    study.tell(0, 50.0)
    study.tell(1, state=TrialState.FAIL)
    for _ in range(2):  # two trials were running, twice in a row
        again, to_go = open_study(own, SPACE)
        assert to_go == 8  # one finished, one failed
    assert [again.ask(SPACE).params for _ in range(2)] == [trial.params for trial in proposed[2:]]
    assert again.ask(SPACE).params not in [trial.params for trial in proposed]  # not the seed's first proposals again


def test_an_invalid_storage_raises_one_sentence(tmp_path):
    (tmp_path / "study.db").write_text("no database")
    with pytest.raises(ValueError, match=r"study\.db cannot be opened by Optuna"):
        open_study(options(f"sqlite:///{tmp_path / 'study.db'}"), SPACE)
    with pytest.raises(ValueError, match="nothing to choose"):
        open_study(options(), {})


def _evil(study):
    study.enqueue_trial({"x": 1e9})


def _running(study):
    study.ask({"x": CategoricalDistribution(["${oc.env:HOME}"])})


def _other_key(study):
    study.enqueue_trial({"x": 1.0, "evil.key": 1})


def _no_number(study):
    study.add_trial(optuna.trial.create_trial(value=1.0))
    study._storage.get_all_trials(study._study_id, deepcopy=False)[0].values = ["text"]


@pytest.mark.parametrize(
    ("direction", "change", "words"),
    [
        ("minimize", None, "its direction is minimize, not hydra.sweeper.direction=maximize"),
        (["maximize", "minimize"], None, "its direction is maximize, minimize, not"),
        ("maximize", _evil, r"its trial 0 has x=1000000000\.0, which this sweep does not search"),
        ("maximize", _running, r"its trial 0 has x=\$\{oc\.env:HOME\}, which this sweep"),
        ("maximize", _other_key, "its trial 0 has evil.key=1, which this sweep"),
        ("maximize", _no_number, "the result of its trial 0 is not a number"),
    ],
)
def test_a_study_that_is_not_of_this_sweep_is_refused(kept, direction, change, words):
    many = isinstance(direction, list)
    study = optuna.create_study(study_name="fit", **{"directions" if many else "direction": direction})
    if change is not None:
        change(study)
    with pytest.raises(ValueError, match=rf"cannot be opened by Optuna .* \({words}.*\): move it away, or sweep in"):
        open_study(options(), SPACE)


@pytest.fixture
def sweep(tmp_path):
    """Runs a sweep of ``lines`` whose trials return ``result``; returns the launched batches of overrides."""

    def run(own, lines, result):
        launched = []

        def launch(batch, initial_job_idx):
            launched.append(batch)
            return [_returned(result, lines) for lines in batch]

        config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}})
        sweep_study(config, SimpleNamespace(launch=launch), None, {**own}, lines)
        return launched

    return run


def _returned(result, lines):
    value = result(lines)
    failed = isinstance(value, Exception)
    returned = JobReturn(status=JobStatus.FAILED if failed else JobStatus.COMPLETED)
    returned.return_value = value
    return returned


def test_failed_trials_and_non_finite_results_are_stored_and_the_sweep_continues(sweep, kept, tmp_path):
    results = iter([UserError("out of memory"), float("nan"), None, 40.0, float("inf"), 50.0])
    own = options(n_trials=6)
    launched = sweep(own, ["x=interval(0.0,1.0)", "y=2"], lambda _: next(results))
    assert [len(batch) for batch in launched] == [1] * 6
    assert all(lines[1] == "y=2" for (lines,) in launched)
    study = optuna.load_study(study_name="fit", storage=kept)
    assert [trial.value for trial in study.trials if trial.state == TrialState.COMPLETE] == [40.0, 50.0]
    assert sum(trial.state == TrialState.FAIL for trial in study.trials) == 4
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert (best.best_value, f"x={best.best_params.x}") == (50.0, launched[5][0][0])


def test_without_completed_trials_there_is_no_best(sweep, tmp_path):
    sweep(options(n_trials=2), ["x=interval(0.0,1.0)"], lambda _: UserError("out of memory"))
    assert not (tmp_path / "sweep" / "optimization_results.yaml").exists()


def test_parallel_trials_with_the_same_values_run_once(sweep):
    launched = sweep(options(n_trials=8, n_jobs=8, sampler="random"), ["x=choice(1,2)"], lambda lines: len(lines[0]))
    assert sorted(launched[0]) == [["x=1"], ["x=2"]]


def test_a_grid_runs_once_and_is_resumed(sweep, kept):
    own = options(sampler="grid", n_trials=4)
    lines = ["x=choice(1,2)", "y=range(0,3)"]
    first = sweep(own, lines, lambda _: 1.0)
    rest = sweep({**own, "n_trials": 100}, lines, lambda _: 1.0)
    tried = [tuple(sorted(lines)) for batch in (*first, *rest) for lines in batch]
    assert sorted(tried) == [(f"x={x}", f"y={y}") for x in (1, 2) for y in (0, 1, 2)]
    assert len(first) == 4


def test_a_grid_rejects_intervals(sweep, capsys):
    with pytest.raises(SystemExit, match="2"):
        sweep(options(sampler="grid"), ["x=interval(0,1.0)"], lambda _: 1.0)
    assert "error: a grid needs values and x has an interval" in capsys.readouterr().out


def test_a_dead_worker_ends_the_sweep_with_one_sentence(sweep, capsys, tmp_path):
    def dies(_):
        raise RuntimeError("A worker process was terminated.\nSee the log.")

    with pytest.raises(SystemExit, match="2"):
        sweep(options(), ["x=interval(0,1.0)"], dies)
    output = capsys.readouterr().out
    assert "a process that ran some has died (RuntimeError: A worker process was terminated.)" in output
    assert f"hydra.sweep.dir={tmp_path / 'sweep'}" in output
