"""Save the W&B project's dashboards: views of its workspace and a report; or, with --dry-run, their JSON."""

import argparse
from pathlib import Path

from rld_lightning.hydra.script import exit_on_user_error
from rld_lightning.package_files import script_command

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog=script_command("dashboard"),
        description=__doc__,
        epilog="Running it again overwrites what it saved before, including edits made in the browser: it finds a view "
        "by its internal name, the report by its title. Copies under other names are left alone.",
    )
    parser.add_argument("--entity", help="user or team; by default the key's")
    parser.add_argument("--project", default="rld-lightning", help="its name; by default %(default)s")
    parser.add_argument(
        "--pair",
        nargs="+",
        default=[],
        help="pairs, each with its own views and run set: options of model= such as wrn40_2_to_wrn16_2, or a run's "
        "model.label, such as resnet20_to_resnet8",
    )
    parser.add_argument("--data", metavar="NAME", help="only runs of this data set, such as cifar100")
    parser.add_argument("--dry-run", type=Path, metavar="FILE", help="write the JSON here; needs no key and no network")
    options = parser.parse_args()
    with exit_on_user_error():
        from rld_lightning.tracking.dashboard import save_dashboard  # needs an extra, and imports slowly

        save_dashboard(options.entity, options.project, options.pair, options.data, options.dry_run)
