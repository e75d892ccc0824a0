"""A local web page that shows for a dropped picture how RLD refines the teacher."""

from rld_lightning.tasks.demo.answers import demo

__all__ = ["demo"]
