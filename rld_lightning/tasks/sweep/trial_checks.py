"""What a trial of a sweep would end with as soon as it starts, said before any is started."""

from pathlib import Path

from omegaconf import DictConfig

from rld_lightning.data.in_memory import InMemoryDataModule
from rld_lightning.errors import user_errors
from rld_lightning.runs.checkpoint import is_there
from rld_lightning.runs.naming import loss_name
from rld_lightning.tasks.run.batch_size import make_data
from rld_lightning.tasks.run.checks import check_names
from rld_lightning.tasks.run.plan import changed, plan_student, plan_teacher
from rld_lightning.tasks.run.resume import find_checkpoint


def check_trial(cfg: DictConfig) -> None:
    """Looks whether what a trial names is there; nothing is downloaded, and no image is read.

    Raises:
        UserError: a network is not known, or a file or a folder that is named is not there.
    """
    with user_errors():
        teacher = None if loss_name(cfg.loss) == "CE" else plan_teacher(cfg.model.teacher)
        check_names(plan_student(cfg.model.student), teacher)
        if (checkpoint := find_checkpoint(cfg.resume)) is not None and not is_there(Path(checkpoint)):
            raise FileNotFoundError(f"resume={checkpoint} is not there; give the folder of a run, or leave it away.")
        settings = changed(cfg, {"paths.run": cfg.paths.runs}).data  # a trial has its folder later
        root = settings.get("root")
        if root is not None and "://" not in str(root) and not Path(root).is_dir():
            data = make_data(settings)
            if not isinstance(data, InMemoryDataModule):  # which may be downloaded; others say what they lack
                data.prepare_data()
                data.setup("fit")
