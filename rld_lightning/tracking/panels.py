"""Panels of the W&B dashboard, with the names of the logged metrics."""

from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as wr

BEST = "val/top1_best"
TOP1 = "val/top1"  # per epoch
LAST = "val/top1.last"  # in a run's summary, where val/top1 is {"max": ..., "last": ...}
EPOCH = "epoch"
ALPHA, BETA, TEMPERATURE = (wr.Config(f"loss.{name}") for name in ("alpha", "beta", "temperature"))
MAX_RUNS = 200  # a panel shows 10 by default
WIDTH, HEIGHT = 12, 8  # of a report's panel, on a grid of 24 columns


@dataclass(frozen=True)
class Part:
    """Related panels: a section of a view, and a chapter of the report."""

    title: str  # its heading
    text: str  # the question it answers, one paragraph
    panels: list[Any]  # the panels
    columns: int = 3  # panels side by side in a view


def comparison_parts() -> list[Part]:
    """Returns the parts that compare methods, for run sets that are already grouped."""

    def curve(title: str, *metrics: str, **options: Any) -> wr.LinePlot:
        return wr.LinePlot(
            title=title,
            x=EPOCH,
            y=list(metrics),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=MAX_RUNS,
            title_x="epoch",
            **options,
        )

    def bars(title: str, metric: str) -> wr.BarPlot:
        return wr.BarPlot(
            title=title,
            metrics=[metric],
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            max_runs_to_show=MAX_RUNS,
            title_x="top-1 (%)",
        )

    def scatter(title: str, x: str, y: str) -> wr.ScatterPlot:
        return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y))

    def table(name: str) -> wr.WeavePanelSummaryTable:
        return wr.WeavePanelSummaryTable(table_name=name, layout=wr.Layout(w=2 * WIDTH, h=2 * HEIGHT))

    return [
        Part(
            "Accuracy",
            "Top-1 in percent on the test split, mean over seeds with the standard deviation as range. Published "
            "tables print the best epoch on the test split, which flatters every method; the scatter plot shows by how "
            "much.",
            [
                bars("Best epoch: top-1 (%), mean and std over seeds", BEST),
                bars("Last epoch: top-1 (%), mean and std over seeds", LAST),
                scatter("Best epoch over last epoch: top-1 (%)", LAST, BEST),
            ],
        ),
        Part(
            "Learning curves",
            "Mean over seeds, with the range from the worst to the best seed.",
            [
                curve("Validation top-1 (%)", TOP1),
                curve("Training top-1 (%)", "train/top1"),
                curve("Validation cross-entropy (nats)", "val/ce"),
            ],
        ),
        Part(
            "Teacher errors",
            "RLD's claim is that it gains where the teacher is wrong. What the teacher gets wrong, how much of it the "
            "student still gets right, what the mask leaves out, and which term does the work.",
            [
                curve("Samples the teacher gets wrong (%)", "stats/teacher_wrong"),
                curve("Training top-1 where the teacher is wrong (%)", "train/top1_teacher_wrong"),
                curve("Validation top-1 where the teacher is wrong (%)", "val/top1_teacher_wrong"),
                scatter("Top-1 (%) over top-1 where the teacher is wrong, last epoch", "val/top1_teacher_wrong", LAST),
                curve("Classes masked out of MCD (%)", "stats/masked_classes"),
                curve("Shares of SCD and MCD in the loss (%)", "stats/scd_share", "stats/mcd_share"),
                curve("Agreement with the teacher, training (%)", "train/agreement"),
                curve("Agreement with the teacher, validation (%)", "val/agreement"),
            ],
        ),
        Part(
            "Training health",
            "Whether a run can be trusted: gradient, learning rate, throughput, and each term of the loss.",
            [
                curve("Loss (nats)", "train/loss"),
                curve("Terms of RLD (nats)", "train/ce", "train/scd", "train/mcd"),
                curve("Terms of KD and DKD (nats)", "train/kd", "train/tckd", "train/nckd"),
                curve("Gradient norm", "train/grad_norm", log_y=True),
                curve("Learning rate", "lr"),
                curve("Training images/s", "train/images_per_s"),
            ],
        ),
        Part(
            "Classes and examples",
            "Accuracy of each class, confusions of the student, and images that the teacher gets wrong and "
            "right, with the distributions of teacher and student and what the loss makes of the teacher. Sort and "
            "filter by a column.",
            [table("classes"), table("confusion_table"), table("examples")],
            columns=1,
        ),
    ]


def tuning_part() -> Part:
    """Returns the part for sweeps of RLD, with one line or point per trial."""
    result = wr.SummaryMetric(LAST)
    columns: dict[str, wr.Config | wr.SummaryMetric] = {
        "alpha": ALPHA,
        "beta": BETA,
        "temperature": TEMPERATURE,
        "held-out top-1 (%)": result,
    }
    gradient = [
        wr.GradientPoint(color=color, offset=at) for color, at in (("#440154", 0), ("#21918c", 50), ("#fde725", 100))
    ]
    return Part(
        "Tuning",
        "Trials on a held-out part of the training split (data.val_fraction), by Hydra or by W&B Sweeps. Their "
        "accuracy is not comparable with the test accuracy above; retrain the best setting on the full split.",
        [
            wr.ParallelCoordinatesPlot(
                title="Settings and held-out top-1, last epoch",
                columns=[
                    wr.ParallelCoordinatesPlotColumn(metric, display_name=name) for name, metric in columns.items()
                ],
                gradient=gradient,
                layout=wr.Layout(w=2 * WIDTH, h=HEIGHT + 2),
            ),
            wr.ParameterImportancePlot(with_respect_to=LAST),
            wr.ScatterPlot(
                title="alpha and beta, coloured by held-out top-1", x=ALPHA, y=BETA, z=result, gradient=gradient
            ),
            wr.ScatterPlot(title="Held-out top-1 (%) over alpha", x=ALPHA, y=result, log_x=True),
            wr.ScatterPlot(title="Held-out top-1 (%) over beta", x=BETA, y=result, log_x=True),
            wr.ScatterPlot(title="Held-out top-1 (%) over temperature", x=TEMPERATURE, y=result),
            wr.LinePlot(
                title="Trials: held-out top-1 (%)", x=EPOCH, y=[TOP1], title_x="epoch", max_runs_to_show=MAX_RUNS
            ),
        ],
        columns=2,
    )
