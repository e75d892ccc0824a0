"""The W&B project's saved views and report, as code: RLD and its baselines, teacher errors, training health, tuning.

Metrics are those that runs log, configuration keys those of ``conf/``. Runs are grouped by what
``conf/logger/wandb.yaml`` sets: the group is data set, networks and recipe, the job type the method. Panels average
over runs with the same values of both.
"""

import copy
import hashlib
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb
from pydantic import BaseModel

try:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces._graphql import execute_graphql
    from wandb_workspaces.expr import And, Config, FilterExpr, Metric
    from wandb_workspaces.reports.v2 import gql
    from wandb_workspaces.workspaces import internal as views

    from rld_lightning.tracking.panels import (
        BEST,
        HEIGHT,
        LAST,
        MAX_RUNS,
        WIDTH,
        Part,
        comparison_parts,
        tuning_part,
    )
except ImportError as error:
    raise ImportError("dashboards need wandb-workspaces: pip install 'rld-lightning[dashboard]'.") from error

from rld_lightning.console import print_line
from rld_lightning.errors import UserError, user_errors
from rld_lightning.hydra.compose import compose
from rld_lightning.hydra.options import list_options
from rld_lightning.limits import LONGEST_TEXT, is_line
from rld_lightning.runs import files
from rld_lightning.runs.folder import check_folder
from rld_lightning.tracking.server import has_key, server, server_problem

_LONGEST_TITLE = 128  # characters
PROJECT = "rld-lightning"  # as in conf/logger/wandb.yaml
METHOD, GROUP = "JobType", "Group"
RLD = "rld_lightning.losses.RLDLoss"
# W&B stores nested values as {"data": {"value": {"val_fraction": ...}}}; its library adds "value" only in panels.
HELD_OUT = Config("data.value.val_fraction")
LOSS = Config("loss.value._target_")
PAIR, DATA = Config("model.value.label"), Config("dataset.value")
TIMEOUT = 15  # seconds to wait for the server's answer


@dataclass(frozen=True)
class Dashboard:
    """The saved views and the report of a W&B project."""

    views: list[ws.Workspace]  # saved views of the project's workspace
    report: wr.Report  # the report


def build_dashboard(
    entity: str, project: str = PROJECT, pairs: Sequence[str] = (), data: str | None = None
) -> Dashboard:
    """Builds the views and the report, without contacting the server.

    Args:
        pairs: labels of teacher-student pairs such as ``resnet20_to_resnet8``: each gets its own views and run set.
            Without any there is one of each for all runs.

    Returns:
        equal objects, ids included, for equal arguments.
    """
    where: dict[str, Any] = {"entity": entity, "project": project}
    kinds: list[tuple[str, list[Part], list[FilterExpr], bool]] = [  # the last: whether runs are grouped
        # On the full training split, validated on the test split; and validated on a held-out part of it.
        ("RLD and baselines", comparison_parts(), [HELD_OUT == 0], True),
        ("Tuning of RLD", [tuning_part()], [HELD_OUT != 0, LOSS == RLD], False),
    ]
    chosen: Sequence[str | None] = pairs or [None]
    run_sets = [(f"{pair or 'all pairs'}{f' on {data}' if data else ''}", pair) for pair in chosen]

    def filters(conditions: list[FilterExpr], pair: str | None) -> And:
        return And(*conditions, *(key == value for key, value in ((PAIR, pair), (DATA, data)) if value is not None))

    views = [
        _view(where, f"{title}: {name}", parts, filters(conditions, pair), group=group)
        for name, pair in run_sets
        for title, parts, conditions, group in kinds
    ]
    chapters = [
        _chapter(part, [(name, filters(conditions, pair)) for name, pair in run_sets], group)
        for _, parts, conditions, group in kinds
        for part in parts
    ]
    report = wr.Report(
        **where,
        title=_title(pairs, data),
        description="Written by rld-lightning dashboard, which overwrites it. Our own runs only, no published numbers.",
        blocks=[wr.TableOfContents(), *(block for chapter in chapters for block in chapter)],
        width="fluid",
    )
    _give_ids(views, report)
    return Dashboard(views, report)


def _view(where: dict[str, Any], name: str, parts: list[Part], filters: And, *, group: bool) -> ws.Workspace:
    return ws.Workspace(
        **where,
        name=name,
        sections=[
            ws.Section(
                name=part.title,
                panels=part.panels,
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(
                    columns=part.columns, rows=math.ceil(len(part.panels) / part.columns)
                ),
            )
            for part in parts
        ],
        settings=ws.WorkspaceSettings(max_runs=MAX_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=filters,
            groupby=[Metric(GROUP), Metric(METHOD)] if group else [],
            pinned_columns=[f"summary:{BEST}", f"summary:{LAST}", "config:seed.value"],
        ),
    )


def _chapter(part: Part, run_sets: list[tuple[str, And]], group: bool) -> list[Any]:
    """Returns a part's heading, text and panels, two panels per row."""
    return [
        wr.H1(part.title),
        wr.P(part.text),
        wr.PanelGrid(
            runsets=[
                wr.Runset(name=name, filters=filters, groupby=[f"run.{GROUP}", f"run.{METHOD}"] if group else [])
                for name, filters in run_sets
            ],
            panels=_rows(part.panels),
        ),
    ]


def _title(pairs: Sequence[str], data: str | None) -> str:
    title = " of ".join(filter(None, ["RLD and its baselines", ", ".join(pairs)])) + (f" on {data}" if data else "")
    if len(title) > _LONGEST_TITLE and len(pairs) > 1:
        title = f"RLD and its baselines of {pairs[0]} and {len(pairs) - 1} more pairs"
    return title[:_LONGEST_TITLE]


def _rows(panels: list[Any]) -> list[Any]:
    """Returns copies of the panels, laid out two per row; a wide panel gets its own row."""
    placed, x, y, height = [], 0, 0, 0
    for panel in map(copy.deepcopy, panels):
        if panel.layout == wr.Layout():
            panel.layout = wr.Layout(w=WIDTH, h=HEIGHT)
        if x + panel.layout.w > 2 * WIDTH:
            x, y, height = 0, y + height, 0
        panel.layout.x, panel.layout.y = x, y
        x, height = x + panel.layout.w, max(height, panel.layout.h)
        placed.append(panel)
    return placed


def _give_ids(views: list[ws.Workspace], report: wr.Report) -> None:
    """Replaces random ids, so that equal dashboards are equal JSON and the server recognises them."""
    for view in views:
        view._internal_name = f"nw-{_hash(view.entity, view.project, view.name)[:11]}-v"
        view._internal_runset_id = _hash("runs", view.name)
        for section in view.sections:
            _name_panels(section.panels)
    for chapter, grid in enumerate(block for block in report.blocks if isinstance(block, wr.PanelGrid)):
        _name_panels(grid.panels)
        for run_set in grid.runsets:
            run_set._id = _hash("run set", str(chapter), run_set.name)


def _name_panels(panels: list[Any]) -> None:
    for panel in panels:
        panel._id = _hash("panel", type(panel).__name__, getattr(panel, "title", getattr(panel, "table_name", "")))


def _hash(*words: str) -> str:
    return hashlib.sha256("/".join(words).encode()).hexdigest()[:12]


def write_json(dashboard: Dashboard, path: Path) -> None:
    """Writes what would be sent to the server, except for the run sets' project id, which only the server knows."""

    def plain(model: BaseModel) -> dict[str, Any]:
        return model.model_dump(mode="json", by_alias=True, exclude_none=True)

    content = {
        "views": [plain(view._to_model()) for view in dashboard.views],
        "report": plain(dashboard.report._to_model()),
    }
    files.write_json(path, content)


def publish(dashboard: Dashboard, api: wandb.Api) -> list[str]:
    """Saves views and report; overwrites existing ones, including edits made in the browser.

    Views are found by an internal name derived from entity, project and display name, the report by its title.

    Returns:
        their URLs, the views' first.

    Raises:
        ValueError: the project does not exist.
    """
    report = dashboard.report
    where = {"entityName": report.entity, "projectName": report.project}
    if not execute_graphql(api, gql.projectInternalId, where).get("project"):
        raise ValueError(
            f"W&B has no project {report.entity}/{report.project} that you can see: log a run first (logger=wandb, "
            "and wandb sync if it was offline), or choose another with --entity and --project."
        )
    for view in dashboard.views:
        with suppress(ValueError):  # a new view
            short = views._internal_name_to_url_query_str(view._internal_name)
            view._internal_id = views.get_view_dict(view.entity, view.project, short)["id"]
        view.save()
    for grid in report.blocks:
        for run_set in grid.runsets if isinstance(grid, wr.PanelGrid) else ():
            run_set.entity, run_set.project = report.entity, report.project
    existing = api.reports(f"{report.entity}/{report.project}")
    report.id = next((other.id for other in existing if other.display_name == report.title), "")
    report.save()
    return [view.url for view in dashboard.views] + [report.url]


def label_of(pair: str) -> str:
    """Returns ``model.label`` of a pair's runs: the label of the option of ``model`` with its networks.

    Args:
        pair: an option of ``model``, or a label, which is returned unchanged.

    Raises:
        ValueError: the option does not determine its networks.
    """
    if pair not in list_options("model"):
        return pair
    model = compose([f"model={pair}"]).model
    if model.student.name is None:
        raise ValueError(f"model={pair} is any pair; give the label of yours, such as resnet20_to_resnet8.")
    return model.label


def save_dashboard(
    entity: str | None, project: str, pairs: Sequence[str], data: str | None = None, dry_run: Path | None = None
) -> None:
    """Builds the dashboard, and saves it in W&B or writes it to a file, for ``scripts/dashboard.py``.

    Args:
        entity: user or team; None for the key's default.
        dry_run: a file to write instead; needs neither a key nor a network.

    Raises:
        UserError: there is no key, W&B is unreachable or refuses, or a name is not a line of text.
    """
    named: dict[str, Sequence[str | None]] = {
        "--entity": [entity],
        "--project": [project],
        "--pair": pairs,
        "--data": [data],
    }
    for option, value in ((option, value) for option, values in named.items() for value in values):
        if value is not None and not is_line(value):
            raise UserError(
                f"{option}={value!r} must be a line of 1 to {LONGEST_TEXT} characters, without control ones."
            )
    pairs = [label_of(pair) for pair in pairs]
    if dry_run is not None:
        with user_errors():
            check_folder(dry_run.parent, "--dry-run", written=(dry_run.name,))
            if dry_run.is_dir():
                raise ValueError(f"--dry-run {dry_run} is a directory; name a file in it.")
        write_json(build_dashboard(entity or os.environ.get("WANDB_ENTITY", ""), project, pairs, data), dry_run)
        print_line("written", str(dry_run))
        return
    hint = "run the same command later, or write the JSON alone, with --dry-run FILE."
    if not has_key():
        raise UserError(f"there is no key for {server()}: `wandb login` or set WANDB_API_KEY; then {hint}")
    if problem := server_problem(TIMEOUT):
        raise UserError(f"W&B's server {server()} {problem}; {hint}")
    wandb.setup(wandb.Settings(silent=True))  # print_line reports it
    try:
        api = wandb.Api(timeout=TIMEOUT)
        addresses = publish(build_dashboard(entity or api.default_entity or "", project, pairs, data), api)
    except ValueError:
        raise
    except Exception as error:  # of the transport, which differs between versions of wandb
        message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"W&B's server {server()} could not be used ({message}); {hint}") from error
    for address in addresses:
        print_line("saved", address)
