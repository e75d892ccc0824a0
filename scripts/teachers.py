"""Manage the teacher store: `list` it, `fetch` published ones, `fit` one, `cache` its logits, `verify` them."""

import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

import argparse
import os
import sys
from pathlib import Path

from omegaconf import DictConfig

from rld_lightning.hydra.script import exit_on_user_error, run_task
from rld_lightning.package_files import script_command

ORIGINAL_ARGV = list(sys.argv)
STORE = Path("teachers")  # need not exist yet


def main(cfg: DictConfig) -> float:
    """Trains a teacher and returns its top-1 accuracy in percent."""
    from rld_lightning.runs.provenance import command  # imports Lightning: slow, so not for help
    from rld_lightning.tasks.teachers import fit_teacher

    command(ORIGINAL_ARGV)
    return fit_teacher(cfg).top1


def fill(cfg: DictConfig) -> None:
    """Computes and caches a teacher's logits for all views of the training images."""
    from rld_lightning.tasks.cache import cache

    cache(cfg)


if __name__ == "__main__":
    if sys.argv[1:2] in (["fit"], ["cache"], ["-sc"]):  # -sc: Hydra's shell completion
        filling = "cache" in sys.argv[1:2]
        line = os.environ.get("COMP_LINE", "").replace(" fit ", " ", 1).replace(" cache ", " ", 1)
        os.environ["COMP_LINE"] = line
        sys.argv[1:] = [word for word in sys.argv[1:] if word not in ("fit", "cache")]
        if filling:
            run_task(fill, "fit", "hydra.run.dir=${paths.runs}/cache/${unique_name:}")
        else:
            run_task(main, "fit", "loss=ce")
        sys.exit()
    parser = argparse.ArgumentParser(
        prog=script_command("teachers"), description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="accuracy, checksum and source of each teacher")
    fetch = commands.add_parser("fetch", help="download the published teachers of CIFAR-100 that are missing")
    fetch.add_argument("--url", help="URL of their archive, if not the original; also file://")
    verify = commands.add_parser(
        "verify", help="measure teachers on the test split, and compare with the published accuracy"
    )
    verify.add_argument(
        "words", nargs="*", metavar="NAME | KEY=VALUE", help="networks (default: all), and options of eval.py"
    )
    for command in (listing, fetch, verify):
        command.add_argument("--root", type=Path, default=STORE, help="folder of the store")
    commands.add_parser("fit", help="train one with cross-entropy and store it: model=wrn40_2, and options of fit.py")
    commands.add_parser(
        "cache", help="precompute its logits for all views of the training images, for fit.py with the same options"
    )
    options, more = parser.parse_known_args()
    if more and (options.what != "verify" or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    with exit_on_user_error():
        from rld_lightning.models.teacher.teacher_store import PUBLISHED_URL, TeacherStore
        from rld_lightning.tasks import teachers

        if options.what != "fetch" and options.root != STORE and not options.root.expanduser().is_dir():
            raise ValueError(f"--root {options.root} is not a folder; name that of a store, {STORE}/ by default.")
        store = TeacherStore(options.root)
        if options.what == "list":
            teachers.print_teachers(store)
        elif options.what == "fetch":
            teachers.fetch_teachers(store, options.url or PUBLISHED_URL)
        else:
            words = [*options.words, *more]  # argparse does not assign words after --root
            settings = [word for word in words if "=" in word]
            teachers.verify_teachers(store, [word for word in words if word not in settings], settings)
