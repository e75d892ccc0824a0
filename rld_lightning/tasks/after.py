"""What follows a run of ``scripts/fit.py`` once it has left its results: ``after=[alone,networks]``, in that order."""

from collections.abc import Callable, Mapping

from rld_lightning.tasks.finished import Finished
from rld_lightning.tasks.networks import compare_networks, train_alone

STEPS: Mapping[str, Callable[[Finished], None]] = {
    "alone": train_alone,  # the student without its teacher, with cross-entropy, in <run>/alone
    "networks": compare_networks,  # teacher, student alone and distilled student side by side, on the test split
}


def go_on(finished: Finished) -> None:
    """Takes the steps that ``after`` names, in the order of :data:`STEPS`, whatever the order there."""
    for name, step in STEPS.items():
        if name in finished.cfg.after:
            step(finished)
