"""Losses on features: features by tap path, and connectors built from their shapes."""

from rld_lightning.losses.features.at import ATLoss, at_loss
from rld_lightning.losses.features.base import FeatureLoss
from rld_lightning.losses.features.catkd import CATKDLoss, catkd_loss
from rld_lightning.losses.features.crd import CRDLoss, crd_loss
from rld_lightning.losses.features.dhkd import DHKDLoss, dhkd_loss
from rld_lightning.losses.features.fitnet import FitNetLoss, fitnet_loss
from rld_lightning.losses.features.kdg import KDGLoss, kdg_feature_loss
from rld_lightning.losses.features.kdsvd import KDSVDLoss, kdsvd_loss
from rld_lightning.losses.features.nst import NSTLoss, nst_loss
from rld_lightning.losses.features.ofd import OFDLoss, ofd_loss
from rld_lightning.losses.features.pkt import PKTLoss, pkt_loss
from rld_lightning.losses.features.reviewkd import ReviewKDLoss, reviewkd_loss
from rld_lightning.losses.features.rkd import RKDLoss, rkd_loss
from rld_lightning.losses.features.simkd import SimKDLoss, simkd_loss
from rld_lightning.losses.features.sp import SPLoss, sp_loss
from rld_lightning.losses.features.vid import VIDLoss, vid_loss

__all__ = [
    "ATLoss",
    "CATKDLoss",
    "CRDLoss",
    "DHKDLoss",
    "FeatureLoss",
    "FitNetLoss",
    "KDGLoss",
    "KDSVDLoss",
    "NSTLoss",
    "OFDLoss",
    "PKTLoss",
    "RKDLoss",
    "ReviewKDLoss",
    "SPLoss",
    "SimKDLoss",
    "VIDLoss",
    "at_loss",
    "catkd_loss",
    "crd_loss",
    "dhkd_loss",
    "fitnet_loss",
    "kdg_feature_loss",
    "kdsvd_loss",
    "nst_loss",
    "ofd_loss",
    "pkt_loss",
    "reviewkd_loss",
    "rkd_loss",
    "simkd_loss",
    "sp_loss",
    "vid_loss",
]
