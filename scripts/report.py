"""Write what finished runs came to as a page: `python scripts/report.py runs/` (HTML, Markdown, CSV; no W&B needed)."""

import argparse
import sys
from pathlib import Path

from rld_lightning.console import print_error, print_line
from rld_lightning.errors import UserError, user_errors
from rld_lightning.reporting.report import write_report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold runs, at any depth")
    parser.add_argument("--out", type=Path, help="folder to write to; report/ in the first folder by itself")
    parser.add_argument("--title", default="Results", help="heading of the page")
    parser.add_argument("--no-latency", action="store_true", help="do not measure the networks on this machine")
    options = parser.parse_args()
    out = options.out or options.folders[0] / "report"
    try:
        with user_errors():
            files = write_report(options.folders, out, title=options.title, latency=not options.no_latency)
    except UserError as error:
        print_error(str(error))
        sys.exit(2)
    for path in (files.html, files.markdown, *files.tables):
        print_line("report", str(path))
