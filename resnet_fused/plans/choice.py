"""Which plan a unit follows: the covariance plan, or statistics of its raw output (*genstats*)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..backends.operands import is_pointwise
from ..compiling import constant
from .spec import Chain, Shortcut, Tail, Unit

ENVIRONMENT_VARIABLE = "RESNET_FUSED_COVARIANCE"
CHOICES = ("auto", "always", "never")

# The plan's algebra costs a few times K·C² for any batch, its convolution M·C·K: about C/M of it. Channels beyond this come
# in the last, smallest feature maps, where there is little to save: of ResNet-50's saved bytes, 2 %.
MOST_CHANNELS = 256

_current: str | None = None  # until set_covariance: what the environment says


def _validated(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source}: expected one of {', '.join(CHOICES)}, got {name!r}")
    return name


def current() -> str:
    """The user's choice: of ``set_covariance``, or of the environment variable, or "auto".

    Raises:
        ValueError: the environment variable holds something else.
    """
    return _current or _of_environment()


@constant
def _of_environment() -> str:
    return _validated(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def set_covariance(choice: str) -> None:
    """Where the covariance plan is used from now on, in every thread; the results are the same up to rounding.

    Args:
        choice: "auto": for 1×1 convolutions that expand (more output than input channels) from at most 256 channels,
            where it saves memory and traffic. "always": for every 1×1 convolution without groups, as a memory option.
            "never": nowhere.
    Raises:
        ValueError: for anything else.
    """
    global _current
    _current = _validated(choice, "set_covariance")


@contextmanager
def covariance(choice: str) -> Iterator[None]:
    """``set_covariance(choice)`` for the duration of a ``with`` block; a backward follows the plan of its forward."""
    previous = current()
    set_covariance(choice)
    try:
        yield
    finally:
        set_covariance(previous)


def _follows_covariance(unit: Unit, pays: bool) -> bool:
    if unit.conv is None or unit.weight is None:
        return False
    channels_out, channels_in = unit.weight.shape[:2]
    wish = current()
    return is_pointwise(unit.weight, unit.conv) and (
        wish == "always" or (wish == "auto" and pays and channels_in < channels_out and channels_in <= MOST_CHANNELS)
    )


def choose_plans(chain: Chain, pays: bool = True) -> Chain:
    """The chain with ``Unit.covariance`` set: for the unit in front of the shortcut, and for the projection.

    Only channels, groups, filter and stride count, never the number of rows, so that one exported graph serves every batch.
    A unit further inside would have to keep its activation in place of its raw output, and save nothing. ``pays``: false
    where the plan was measured to be slower, which counts under "auto".
    """
    last = len(chain.path) - 1
    eligible = {last} if chain.tail != Tail.RELU_MAXPOOL else set()
    if chain.shortcut == Shortcut.PROJECTION:
        eligible.add(last + 1)
    following = {i for i in eligible if _follows_covariance(chain.units[i], pays)}
    if not following:
        return chain
    units = [replace(u, covariance=True) if i in following else u for i, u in enumerate(chain.units)]
    return replace(chain, units=tuple(units))
