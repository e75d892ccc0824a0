"""The frozen teacher: a network or ensemble, optionally sharded, its cached logits, and the store of trained ones."""

from rld_lightning.models.teacher.frozen import FrozenTeacher

__all__ = ["FrozenTeacher"]
