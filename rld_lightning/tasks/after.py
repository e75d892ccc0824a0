"""What follows a run of ``scripts/fit.py`` once it has left its results, as ``after=[alone,networks,export]`` says."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec

from rld_lightning.console import print_line
from rld_lightning.distributed import rank_zero_only
from rld_lightning.errors import user_errors
from rld_lightning.hydra.quoting import as_argument
from rld_lightning.shipped import called
from rld_lightning.tasks.finished import Finished
from rld_lightning.tasks.networks import compare_networks, train_alone

_ONNX = ("onnx", "onnxscript", "onnxruntime")


@rank_zero_only
def export_student(finished: Finished) -> None:
    """Exports the student with a model card, to ONNX too where that is installed, and says how to predict with it."""
    from rld_lightning.tasks.export import export_run  # takes a second that other runs need not wait for

    run = finished.plan.run
    formats = ["safetensors", *(["onnx"] if all(map(find_spec, _ONNX)) else [])]
    if len(formats) < 2:
        print_line("export", 'without ONNX, which needs pip install "rld-lightning[onnx]"')
    with user_errors():
        export_run(run, formats)
    print_line("next", f"{called('predict')} {as_argument('weights', run)} images=photo.jpg", pasted=True)


STEPS: Mapping[str, Callable[[Finished], None]] = {
    "alone": train_alone,  # the student without its teacher, with cross-entropy, in <run>/alone
    "networks": compare_networks,  # teacher, student alone and distilled student side by side, on the test split
    "export": export_student,  # safetensors, ONNX and a model card in <run>/export
}


def go_on(finished: Finished) -> None:
    """Takes the steps that ``after`` names, in the order of :data:`STEPS`, whatever the order there."""
    for name, step in STEPS.items():
        if name in finished.cfg.after:
            step(finished)
