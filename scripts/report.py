"""Write a report on finished runs: `python scripts/report.py runs/` (HTML, Markdown, CSV; no W&B needed)."""

import argparse
from functools import partial
from pathlib import Path

from rld_lightning.hydra.script import exit_on_user_error
from rld_lightning.package_files import script_command

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog=script_command("report"), description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold runs, at any depth")
    parser.add_argument("--out", type=Path, help="folder to write to; by default report/ in the first folder")
    parser.add_argument("--title", default="Results", help="heading of the page")
    parser.add_argument("--no-latency", action="store_true", help="do not measure the networks on this machine")
    parser.add_argument("--latex", action="store_true", help="also write the results tables for papers, results.tex")
    parser.add_argument(
        "--figures", nargs="+", default=[], choices=("pdf", "svg"), help="write figures in these formats besides PNG"
    )
    options = parser.parse_intermixed_args()  # options may be between folders
    out = options.out or options.folders[0] / "report"
    with exit_on_user_error():
        from rld_lightning.console import print_line  # slow imports, so not for --help
        from rld_lightning.reporting.report import write_report
        from rld_lightning.runs.folder import check_within
        from rld_lightning.tasks.cost import measure_cost

        if options.out is None:
            check_within(out, options.folders[0], "--out")
        cost_of = partial(measure_cost, latency=not options.no_latency)
        files = write_report(
            options.folders, out, title=options.title, cost_of=cost_of, latex=options.latex, pictures=options.figures
        )
    for path in (files.html, files.markdown, *files.tables, *filter(None, [files.latex])):
        print_line("report", str(path))
