"""Imports of the process that the soak's runs are forked from."""

import helpers.configs  # noqa: F401
import torch

import rld_lightning.tasks.fit  # noqa: F401

torch.set_num_threads(1)
