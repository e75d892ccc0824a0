"""The W&B dashboard uses names that runs log, is deterministic, and is updated, not duplicated."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import wandb

pytest.importorskip("wandb_workspaces", reason="the dashboard extra is not installed")

import wandb_workspaces.reports.v2 as wr
from wandb_workspaces.reports.v2 import internal as report_models
from wandb_workspaces.workspaces import internal as view_models

from rld_lightning.errors import UserError
from rld_lightning.losses import DKDLoss, KDLoss
from rld_lightning.runs.settings import flat
from rld_lightning.tracking.dashboard import build_dashboard, label_of, save_dashboard, write_json
from rld_lightning.tracking.panels import comparison_parts, tuning_part

ROOT = Path(__file__).parents[2]
from helpers.wandb_stub import Handler, serving, values  # noqa: E402

PAIR = "wrn16_1_to_wrn16_1"


@pytest.fixture(scope="module")
def run(finished):
    """Returns what a run of RLD logs to W&B: keys of history and summary, configuration, group and job type."""
    _, _, records = finished
    return {
        "history": {key for record in records for key in values(record.history.item)},
        "summary": {key for record in records for key in flat(values(record.summary.update))},
        "config": {key: value for record in records for key, value in values(record.config.update).items()}
        | {key: value for record in records for key, value in values(record.run.config.update).items()},
        "run": next(record.run for record in records if record.HasField("run")),
    }


def panels(content):
    """Returns all panels of the JSON: those of the views, then those of the report."""
    for view in content["views"]:
        for section in view["spec"]["section"]["panelBankConfig"]["sections"]:
            yield from section["panels"]
    for block in content["report"]["spec"]["blocks"]:
        if block["type"] == "panel-grid":
            yield from block["metadata"]["panelBankSectionConfig"]["panels"]


def run_sets(content):
    for view in content["views"]:
        yield from view["spec"]["section"]["runSets"]
    for block in content["report"]["spec"]["blocks"]:
        yield from block.get("metadata", {}).get("runSets", [])


@pytest.fixture
def content(tmp_path):
    write_json(build_dashboard("me", pairs=[PAIR], data="digits"), tmp_path / "dashboard.json")
    return json.loads((tmp_path / "dashboard.json").read_text())


def config_paths(content):
    """Returns the configuration keys of panels, columns and filters, as W&B stores them."""
    text = json.dumps(list(panels(content)))
    yield from re.findall(r'"config:([^"]+)"', text)
    for run_set in run_sets(content):
        yield from (key.removeprefix("config:") for key in run_set["runFeed"]["columnPinned"] if "config:" in key)
        yield from (f["key"]["name"] for f in run_set["filters"]["filters"] if f["key"]["section"] == "config")


@pytest.mark.slow
def test_every_metric_of_a_panel_is_logged_by_a_run(content, run):
    logits = torch.randn(4, 10)
    others = {f"train/{term}" for loss in (KDLoss(), DKDLoss()) for term in loss(logits, logits, torch.arange(4))}
    lines = [panel["config"] for panel in panels(content) if panel["viewType"] == "Run History Line Plot"]
    assert {key for line in lines for key in [*line["metrics"], line["xAxis"]]} <= run["history"] | others
    bars = {key for panel in panels(content) if panel["viewType"] == "Bar Chart" for key in panel["config"]["metrics"]}
    targets = {p["config"]["targetKey"] for p in panels(content) if p["viewType"] == "Parameter Importance"}
    named = set(re.findall(r'"summary:([^"]+)"', json.dumps(content)))
    assert bars | targets | named <= run["summary"]
    assert {"val/top1.last", "val/top1_best", "val/top1_teacher_wrong"} <= bars | targets | named
    tables = {panel.table_name for panel in comparison_parts()[-1].panels}
    assert (
        tables
        == {"classes", "confusion_table", "examples"}
        <= run["summary"] | {key.split(".")[0] for key in run["summary"]}
    )


def test_every_configuration_key_exists_in_a_run(content, run):
    found = set(config_paths(content))
    for path in found:
        first, value, *rest = path.split(".")
        assert value == "value"
        here = run["config"][first]
        for key in rest:
            here = here[key]
    assert {"loss.value.alpha", "data.value.val_fraction", "loss.value._target_"} <= found


def test_filters_and_groups_match_the_settings_of_a_run(content, run):
    filters = [{f["key"]["name"]: (f["op"], f["value"]) for f in s["filters"]["filters"]} for s in run_sets(content)]
    assert {(f["model.value.label"], f["dataset.value"]) for f in filters} == {(("=", PAIR), ("=", "digits"))}
    assert (run["config"]["model"]["label"], run["config"]["dataset"]) == (PAIR, "digits")
    assert run["run"].run_group == f"digits-{PAIR}-recipe"
    assert {f["data.value.val_fraction"] for f in filters} == {("=", 0), ("!=", 0)}
    assert run["config"]["data"]["val_fraction"] == 0
    (target,) = {f["loss.value._target_"][1] for f in filters if "loss.value._target_" in f}
    assert target == run["config"]["loss"]["_target_"]
    grouped = [p["config"] for p in panels(content) if "groupAgg" in p["config"]]
    assert grouped
    assert {(g.get("groupBy"), g["groupAgg"]) for g in grouped} == {(None, "mean")}  # by what the run sets have
    keys = [[key["name"] for key in run_set["grouping"]] for run_set in run_sets(content)]
    assert all(names in ([], ["group", "jobType"]) for names in keys)
    assert run["run"].job_type == "rld"


def test_json_is_valid_stable_and_without_collisions(content, tmp_path):
    write_json(build_dashboard("me", pairs=[PAIR], data="digits"), tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == content
    for view in content["views"]:
        assert view_models.View.model_validate(view).display_name.endswith(f"{PAIR} on digits")
        assert re.fullmatch(r"nw-[0-9a-f]{11}-v", view["name"])
        ids = Counter(p["__id__"] for s in view["spec"]["section"]["panelBankConfig"]["sections"] for p in s["panels"])
        assert max(ids.values()) == 1
    report = report_models.ReportViewspec.model_validate(content["report"])
    grids = [block for block in report.spec.blocks if isinstance(block, report_models.PanelGrid)]
    assert len(grids) == len(comparison_parts()) + 1
    for grid in grids:
        shown = grid.metadata.panel_bank_section_config.panels
        assert not [p for p in shown if isinstance(p, report_models.UnknownPanel)]
        cells = Counter(
            (x, y)
            for p in shown
            for x in range(p.layout.x, p.layout.x + p.layout.w)
            for y in range(p.layout.y, p.layout.y + p.layout.h)
        )
        assert max(cells.values()) == 1
        assert max(x for x, _ in cells) < 24


def test_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a directory; name a file in it"):
        save_dashboard("me", "p", [], dry_run=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder; choose another one with --dry-run"):
        save_dashboard("me", "p", [], dry_run=tmp_path / "file" / "x.json")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "", "x" * 301])
def test_names_that_are_no_lines_are_refused(tmp_path, name):
    for option, arguments in (
        ("--project", (None, name, [])),
        ("--pair", (None, "p", [name])),
        ("--data", (None, "p", [], name)),
    ):
        with pytest.raises(UserError, match=rf"^{option}=.* must be a line of 1 to 300 characters"):
            save_dashboard(*arguments, dry_run=tmp_path / "d.json")
    assert not list(tmp_path.iterdir())


def test_a_long_name_shortens_the_title():
    assert len(build_dashboard("", data="x" * 300).report.title) == 128


def test_pairs_get_separate_views_and_run_sets(tmp_path):
    three = build_dashboard("me", "p", ["a_to_b", "c_to_d", "e_to_f"])
    assert [view.name.split(": ")[1] for view in three.views] == ["a_to_b"] * 2 + ["c_to_d"] * 2 + ["e_to_f"] * 2
    assert len({view._internal_name for view in three.views}) == 6
    for grid in three.report.blocks:
        if isinstance(grid, wr.PanelGrid):
            assert [run_set.name for run_set in grid.runsets] == ["a_to_b", "c_to_d", "e_to_f"]
    everything = build_dashboard("me", "p")
    write_json(everything, tmp_path / "all.json")
    content = json.loads((tmp_path / "all.json").read_text())
    grouping = [[key["name"] for key in run_set["grouping"]] for run_set in run_sets(content)]
    assert ["group", "jobType"] in grouping
    assert not any("groupBy" in panel["config"] for panel in panels(content))
    assert len(build_dashboard("me", pairs=[f"long_name_{i}_to_another" for i in range(9)]).report.title) <= 128


def test_pair_is_given_as_an_option_or_as_a_label(tmp_path):
    (tmp_path / "root").symlink_to("/")  # other files of the folder do not matter
    save_dashboard("me", "p", ["wrn40_2_to_wrn16_2", PAIR], dry_run=tmp_path / "board.json")
    content = json.loads((tmp_path / "board.json").read_text())
    filters = [f for s in run_sets(content) for f in s["filters"]["filters"]]
    assert {f["value"] for f in filters if f["key"]["name"] == "model.value.label"} == {"wrn40_2_to_wrn16_2", PAIR}
    with pytest.raises(ValueError, match=r"model=pair is any pair; give the label of yours"):
        label_of("pair")


def test_tuning_plots_settings_against_the_result():
    coordinates = tuning_part().panels[0]
    assert [column.display_name for column in coordinates.columns][:3] == ["alpha", "beta", "temperature"]


class Shelf(Handler):
    """Stores views and reports as W&B's server does."""

    def data(self, body):
        query, variables = json.loads(body)["query"], json.loads(body).get("variables") or {}
        kept = self.server.kept
        project = {"id": "p", "name": "rld-lightning", "entityName": "me", "internalId": "42"}
        if "upsertView(" in query:
            key = variables.get("id") or f"id{len(kept)}"
            kept[key] = {
                "id": key,
                "description": "",
                **{k: variables[k] for k in ("type", "name", "displayName", "spec")},
            }
            return {"upsertView": {"inserted": True, "view": kept[key] | {"project": project}}}
        if "allViews" in query:
            wanted = variables.get("viewType", "runs"), variables.get("viewName")
            found = [v for v in kept.values() if v["type"] == wanted[0] and wanted[1] in (None, v["name"])]
            edges = [{"node": view | {"user": None}, "cursor": view["id"]} for view in found]
            return {"project": {"allViews": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}}}
        if "ProjectInternalId" in query:
            return {"project": project if variables["projectName"] == "rld-lightning" else None}
        if "GetProjects" in query:
            node = project | {"createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
            return {"models": {"edges": [{"node": node}], "pageInfo": {"endCursor": None, "hasNextPage": False}}}
        return super().data(body)


def test_second_save_updates_the_first(tmp_path, monkeypatch, capsys):
    wandb.teardown()  # other tests' connection
    with serving("well") as server:
        server.RequestHandlerClass, server.kept = Shelf, {}
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        for _ in range(2):
            save_dashboard(None, "rld-lightning", ["a_to_b"])
        with pytest.raises(ValueError, match="no project me/typo that you can see: log a run first"):
            save_dashboard(None, "typo", ["a_to_b"])
        wandb.teardown()
    kept = list(server.kept.values())
    assert Counter(view["type"] for view in kept) == {"project-view": 2, "runs": 1}
    assert len([line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("saved")]) == 6
    report = json.loads(kept[-1]["spec"])
    (grid, *_) = [block for block in report["blocks"] if block["type"] == "panel-grid"]
    assert grid["metadata"]["runSets"][0]["project"] == {"name": "rld-lightning", "entityName": "me", "id": "42"}


def test_missing_key_or_server_is_one_sentence(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"no key for http://127\.0\.0\.1:9: `wandb login` or set WANDB_API_KEY.*--dry-run"
    ):
        save_dashboard("me", "p", [])
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 cannot be reached .*--dry-run FILE"):
        save_dashboard("me", "p", [])


@pytest.mark.slow
def test_script_writes_the_json_without_key_or_network(tmp_path):
    file = tmp_path / "new" / "dashboard.json"
    environment = {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "netrc"),
        "PATH": "",
        "https_proxy": "http://127.0.0.1:9",
    }
    command = [sys.executable, ROOT / "scripts" / "dashboard.py"]
    for arguments, code in ((["--dry-run", file], 0), ([], 2)):
        result = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == code, result.stdout + result.stderr
    assert "there is no key" in result.stdout
    assert set(json.loads(file.read_text())) == {"views", "report"}
