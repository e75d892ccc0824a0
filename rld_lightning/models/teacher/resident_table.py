"""A table of a teacher's logits that lies on the device as well, so that a step that looks up does not wait."""

import torch
from torch import Tensor

from rld_lightning.models.teacher.logits_table import LogitsTable

_ROWS = 2**18  # looked at in one go
_SHARE = 0.5  # of the free memory that a table may take


class ResidentTable(LogitsTable):
    """As the table it is made of, whose rows it reads once and whose file it fills.

    Where each row is known, a look-up asks for nothing but the rows: nothing is read from the device. Rows that others
    write into the file meanwhile are not seen.

    Attributes:
        complete: whether each row that will be looked up is known.
    """

    def __init__(self, file: LogitsTable, device: torch.device) -> None:
        self.__dict__.update(vars(file))
        self.file = file
        self.table, self.weights = file.table.to(device, copy=True), file.weights.to(device)
        asked = torch.arange(len(self.table)) if self.asked is None else self.asked()
        self.complete = all(bool(self.known(rows).all()) for rows in asked.to(device).split(_ROWS))

    def write(self, rows: Tensor, logits: Tensor, label: Tensor) -> Tensor:
        """Keeps the logits of views, in the file too."""
        kept = self.file.write(rows, logits, label)
        self.table[rows.to(self.table.device)] = self.file.table[rows.cpu()].to(self.table.device)
        return kept


def resident(table: LogitsTable, device: torch.device) -> LogitsTable:
    """The table on a GPU that has room for it; elsewhere as it is."""
    if device.type != "cuda" or isinstance(table, ResidentTable):
        return table
    free, _ = torch.cuda.mem_get_info(device)
    return ResidentTable(table, device) if table.table.nbytes < _SHARE * free else table
