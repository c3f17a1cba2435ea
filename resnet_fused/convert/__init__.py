"""Bringing other people's models and weights in: ``fuse``, ``unfuse``, ``load``, ``read``."""

from .checkpoints import load, read, resolve
from .fuse import FusionReport, fuse, unfuse

__all__ = ["FusionReport", "fuse", "load", "read", "resolve", "unfuse"]
