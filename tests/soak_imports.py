"""What processes of the soak are forked with."""

import helpers.configs  # noqa: F401
import torch

import rld_lightning.tasks.fit  # noqa: F401

torch.set_num_threads(1)
