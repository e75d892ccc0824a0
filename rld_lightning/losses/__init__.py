"""Distillation losses: each method is a pure function of tensors and a module that holds its hyper-parameters.

The functions of logits return named, weighted scalar terms; their sum is minimised. Arguments that they share:

    student_logits: ``(B, C)`` or ``(B, C, *)``, any floating type; float16 and bfloat16 are computed in float32.
    teacher_logits: the same shape; never receives a gradient.
    label: ``(B,)`` or ``(B, *)`` class indices. If it may be ``None``, it is used only to skip ignored samples.
    logit_standardization: z-score both logits first (LSKD, arXiv 2403.01427).
    ignore_index: label of samples to ignore.
    reduction: ``"mean"`` over the samples not ignored, ``"sum"`` or ``"none"`` (each term is then ``(B, *)``).

They raise ``ValueError`` for invalid shapes, class counts, labels or hyper-parameters. The arguments that all modules
share, such as the weight of the cross-entropy and the warm-up, are documented in :class:`DistillationLoss`.
"""

from rld_lightning.losses.atkd import ATKDLoss, atkd_loss
from rld_lightning.losses.base import DistillationLoss, LogitLoss, ModelOutput, StepContext
from rld_lightning.losses.ce import CELoss
from rld_lightning.losses.combined import CombinedLoss
from rld_lightning.losses.ctkd import CTKDLoss, ctkd_loss
from rld_lightning.losses.dist import DISTLoss, dist_loss
from rld_lightning.losses.dkd import DKDLoss, dkd_loss
from rld_lightning.losses.dtkd import DTKDLoss, dtkd_loss
from rld_lightning.losses.eadkd import EADKDLoss, eadkd_loss
from rld_lightning.losses.eakd import EAKDLoss, eakd_loss
from rld_lightning.losses.kd import KDLoss, kd_loss
from rld_lightning.losses.kdg import KDGLogitLoss, kdg_logit_loss
from rld_lightning.losses.ldrld import LDRLDLoss, ldrld_loss
from rld_lightning.losses.mlkd import MLKDLoss, mlkd_loss
from rld_lightning.losses.mlkd_noaug import MLKDNoAugLoss, mlkd_noaug_loss
from rld_lightning.losses.nkd import NKDLoss, nkd_loss
from rld_lightning.losses.normkd import NormKDLoss, normkd_loss
from rld_lightning.losses.rc import RCLoss, rc_loss
from rld_lightning.losses.registry import list_losses, loss_class, loss_options, register_loss
from rld_lightning.losses.revision import RevisionLoss, revision_loss
from rld_lightning.losses.rld import RLDLoss, rld_loss
from rld_lightning.losses.swap import SwapLoss, swap_loss
from rld_lightning.losses.ttm import TTMLoss, ttm_loss
from rld_lightning.losses.wttm import WTTMLoss, wttm_loss

__all__ = [
    "ATKDLoss",
    "CELoss",
    "CTKDLoss",
    "CombinedLoss",
    "DISTLoss",
    "DKDLoss",
    "DTKDLoss",
    "DistillationLoss",
    "EADKDLoss",
    "EAKDLoss",
    "KDGLogitLoss",
    "KDLoss",
    "LDRLDLoss",
    "LogitLoss",
    "MLKDLoss",
    "MLKDNoAugLoss",
    "ModelOutput",
    "NKDLoss",
    "NormKDLoss",
    "RCLoss",
    "RLDLoss",
    "RevisionLoss",
    "StepContext",
    "SwapLoss",
    "TTMLoss",
    "WTTMLoss",
    "atkd_loss",
    "ctkd_loss",
    "dist_loss",
    "dkd_loss",
    "dtkd_loss",
    "eadkd_loss",
    "eakd_loss",
    "kd_loss",
    "kdg_logit_loss",
    "ldrld_loss",
    "list_losses",
    "loss_class",
    "loss_options",
    "mlkd_loss",
    "mlkd_noaug_loss",
    "nkd_loss",
    "normkd_loss",
    "rc_loss",
    "register_loss",
    "revision_loss",
    "rld_loss",
    "swap_loss",
    "ttm_loss",
    "wttm_loss",
]
