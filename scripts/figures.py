"""The figures of the RLD paper from finished runs: `python scripts/figures.py all runs/compare`, or one of them."""

import argparse
from pathlib import Path

from rld_lightning.console import console, print_line
from rld_lightning.hydra.script import exit_on_user_error
from rld_lightning.package_files import script_command
from rld_lightning.reporting.figures import RegisteredFigure, list_figures, write_all
from rld_lightning.reporting.frame import read_frame
from rld_lightning.runs.folder import check_folder, check_within
from rld_lightning.tasks.logit_reader import LogitReader

FIGURES = "figures"  # default folder of the files, in the folder of the runs


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", figure: RegisteredFigure) -> None:
    """Adds a figure's command, with the options of its function."""
    description = (figure.write.__doc__ or figure.summary).split("\n\n")[0]
    command = commands.add_parser(figure.name, help=figure.summary, description=description)
    command.set_defaults(write=figure.write)
    command.add_argument("--out", type=Path, help=f"folder to write to; by default {FIGURES}/ in the first one of runs")
    if runs := figure.parameters.get("runs"):
        some = "+" if runs.default is runs.empty else "*"
        command.add_argument("runs", nargs=some, type=Path, help="folders that hold finished runs")
    if "pair" in figure.parameters:
        command.add_argument("--pair", help="such as resnet20_to_resnet8, if the folders hold several")
    if "reader" in figure.parameters:
        command.add_argument(
            "--teacher",
            type=Path,
            metavar="PATH",
            help="the teacher's weights, if they have moved: the directory of a run or an export, or a file",
        )
        command.add_argument("--data", type=Path, metavar="FOLDER", help="the data, if it has moved")
    figure.add_options(command)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog=script_command("figures"), description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="FIGURE")
    everything = RegisteredFigure("all", "whatever the runs suffice for", write_all, lambda _: None)
    for figure in (*list_figures(), everything):
        add_command(commands, figure)
    options = vars(parser.parse_args())
    write = options.pop("write")
    with exit_on_user_error():
        folders = options.get("runs", [])
        if "runs" in options:
            options["runs"], found = read_frame(folders)
            for folder, reason in found.broken:
                print_line("left out", f"{folder}: {reason}")
            if write is write_all and options["runs"].empty:
                raise ValueError(f"there is no finished run in {', '.join(map(str, folders))}; toy needs none.")
        if "data" in options:
            options["reader"] = LogitReader(options.pop("data"), options.pop("teacher"))
        if options["out"] is None:
            folder = options.get("run") or next(iter(folders), Path("runs"))
            options["out"] = out = folder / FIGURES
            check_within(out, folder, "--out")
        check_folder(options["out"], "--out")
        for file in write(**options):
            console.print(f"  {file}", soft_wrap=True, markup=False)
