"""A local page on which one drops a picture and sees what RLD makes of the teacher."""

from rld_lightning.tasks.demo.answers import demo

__all__ = ["demo"]
