"""Compare losses on a pair, from nothing to a report. What is there already is not repeated: the same command goes on.

python scripts/compare.py model=wrn40_2_to_wrn16_2 losses=ce,kd,dkd,rld seeds=0,1,2
python scripts/compare.py model=pair model.teacher.name=resnet20 model.student.name=resnet8 model.teacher.weights=fit \
    losses=ce,rld seeds=0,1,2 recipe=quick recipe.epochs=30 launcher=joblib
"""

import argparse
from pathlib import Path

from rld_lightning.hydra.script import exit_on_user_error
from rld_lightning.tasks.compare import compare, split_list, split_seeds

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "options",
        nargs="*",
        metavar="key=value",
        help="losses=ce,kd,dkd,rld seeds=0,1,2 folder=runs/compare/<pair>, and any of scripts/fit.py's for all runs",
    )
    given = parser.parse_args().options
    own = {"losses": "ce,kd,dkd,rld", "seeds": "0,1,2", "folder": ""}
    for option in given:
        key, _, value = option.partition("=")
        if key in own:
            own[key] = value
    with exit_on_user_error():
        compare(
            split_list(own["losses"]),
            split_seeds(own["seeds"]),
            [option for option in given if option.partition("=")[0] not in own],
            Path(own["folder"]) if own["folder"] else None,
        )
