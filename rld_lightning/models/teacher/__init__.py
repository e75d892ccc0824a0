"""The frozen teacher: one network or several, whole or shared out, its logits kept, and the folder of trained ones."""

from rld_lightning.models.teacher.frozen import FrozenTeacher

__all__ = ["FrozenTeacher"]
