"""PEP 517 build backend: setuptools, and PyTorch from where it already is.

pip's isolated build hides the environment's packages from ``import`` but runs on its interpreter, so the installed
PyTorch is found as files (toolchain.find_torch); only its headers and libraries are used. It becomes a build
requirement only when there is none.
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import toolchain
from setuptools import build_meta

build_sdist = build_meta.build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def _with_torch(requirements: list[str]) -> list[str]:
    return requirements if toolchain.find_torch() else [*requirements, "torch>=2.10"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
