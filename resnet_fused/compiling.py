"""What torch.compile is told about a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Let torch.compile call ``function`` while it compiles and keep the result.

    ``torch.compiler.assume_constant_result`` does the same, and imports the compiler for it, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
