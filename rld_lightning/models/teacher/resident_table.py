"""A table of the teacher's logits with a copy on the device, so that look-ups do not wait for the CPU."""

import torch
from torch import Tensor

from rld_lightning.models.teacher.logits_table import LogitsTable

_ROWS = 2**18  # checked at once
_SHARE = 0.5  # of the free memory that a table may use


class ResidentTable(LogitsTable):
    """A :class:`LogitsTable` on the device: reads the file's rows once at the start, and writes new rows to both.

    If all rows are known, a look-up needs no synchronisation with the device. Rows that other processes write to the
    file later are not seen.

    Attributes:
        complete: whether each row that will be looked up is known.
    """

    def __init__(self, file: LogitsTable, device: torch.device) -> None:
        self.__dict__.update(vars(file))
        self.file = file
        # Reading the holes of an empty file takes seconds.
        self.table = torch.zeros_like(file.table, device=device) if file.is_empty else file.table.to(device, copy=True)
        self.weights = file.weights.to(device)
        rows = torch.arange(len(self.table)) if self.rows_to_read is None else self.rows_to_read()
        self.complete = all(bool(self.known(part).all()) for part in rows.to(device).split(_ROWS))

    def write(self, rows: Tensor, logits: Tensor, label: Tensor) -> Tensor:
        """Stores the logits of views, on the device and in the file."""
        kept = self.file.write(rows, logits, label)
        self.table[rows.to(self.table.device)] = self.file.table[rows.cpu()].to(self.table.device)
        return kept


def resident(table: LogitsTable, device: torch.device) -> LogitsTable:
    """Returns a copy of the table on the GPU if it fits; otherwise the table itself."""
    if device.type != "cuda" or isinstance(table, ResidentTable):
        return table
    free, _ = torch.cuda.mem_get_info(device)
    return ResidentTable(table, device) if table.table.nbytes < _SHARE * free else table
