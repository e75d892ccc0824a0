"""The figures of the RLD paper from finished runs: `python scripts/figures.py all runs/compare`, or one of them."""

import argparse
from pathlib import Path

from rld_lightning.hydra.script import exit_on_user_error
from rld_lightning.reporting.figures import write
from rld_lightning.reporting.figures.logits import LogitReader
from rld_lightning.runs.finished import find_runs

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    figures = parser.add_subparsers(required=True, metavar="FIGURE")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, default=Path("runs/figures"), help="folder for the files (%(default)s)")
    folders = argparse.ArgumentParser(add_help=False)
    folders.add_argument("runs", nargs="+", type=Path, help="folders that hold finished runs")
    pair = argparse.ArgumentParser(add_help=False)
    pair.add_argument("--pair", help="such as resnet20_to_resnet8, where the folders hold several")
    networks = argparse.ArgumentParser(add_help=False)
    networks.add_argument("--teacher", type=Path, metavar="FILE", help="its weights, if they have moved")
    networks.add_argument("--data", type=Path, metavar="FOLDER", help="the data, if they have moved")

    toy = figures.add_parser("toy", parents=[shared], help="one wrong prediction: corrections and RLD")
    toy.set_defaults(write=write.write_toy)

    explain = figures.add_parser("explain", parents=[shared, networks], help="RLD on one sample: a picture and a page")
    explain.set_defaults(write=write.write_explanation)
    explain.add_argument("--run", type=Path, help="folder of a distilled run; without it the toy example")
    explain.add_argument("--index", type=int, help="of a validation image; without it one that the teacher gets wrong")

    every = [shared, folders, pair]
    maps = figures.add_parser("differences", parents=[*every, networks], help="students and their teacher, heat maps")
    maps.set_defaults(write=write.write_differences)
    maps.add_argument("--methods", nargs="+", default=["dkd", "rld"], help="losses, in order (dkd rld)")
    maps.add_argument("--standardized", action="store_true", help="z-score each sample's logits first")
    maps.add_argument("--top", type=float, help="upper end of the colour scale, to compare figures")

    gain = figures.add_parser("gain", parents=[shared, folders], help="gain by the teacher's training accuracy")
    gain.set_defaults(write=write.write_gain)
    gain.add_argument("--method", default="rld")
    gain.add_argument("--over", nargs="+", default=["ce", "kd", "dkd"], help="what it is compared to (ce kd dkd)")
    gain.add_argument("--best", action="store_true", help="compare best epochs, not last ones")

    sweep = figures.add_parser("sensitivity", parents=every, help="accuracy by swept alpha, beta ...")
    sweep.set_defaults(write=write.write_sensitivity)
    sweep.add_argument("--method", help="where several were swept")

    ablation = figures.add_parser("ablation", parents=every, help="table of RLD's parts beside the paper's")
    ablation.set_defaults(write=write.write_ablation)
    everything = figures.add_parser("all", parents=[shared, folders, networks], help="whatever the runs suffice for")
    everything.set_defaults(write=write.write_all)

    options = vars(parser.parse_args())
    write_figure = options.pop("write")
    with exit_on_user_error():
        if "runs" in options:
            options["runs"] = find_runs(options["runs"])
        if "data" in options:
            options["reader"] = LogitReader(options.pop("data"), options.pop("teacher"))
        write.print_written(write_figure(**options))
