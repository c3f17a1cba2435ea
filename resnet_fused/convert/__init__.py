"""Bringing other people's models and weights in and out: ``fuse``, ``unfuse``, ``load``, ``read``, ``save_pretrained``."""

from .checkpoints import load, read, resolve
from .fuse import FusionReport, fuse, unfuse
from .hugging_face import save_pretrained

__all__ = ["FusionReport", "fuse", "load", "read", "resolve", "save_pretrained", "unfuse"]
