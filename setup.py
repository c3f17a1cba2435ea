"""The extension modules; everything else about the package stands in pyproject.toml.

Environment: CXX, CXXFLAGS, MAX_JOBS, DEBUG=1 (-O0 -g), FORCE_CUDA=1, CUDA_HOME, TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import compilation  # noqa: E402
import toolchain  # noqa: E402

FAILURE_NOTE = "_build_failure.txt"  # resnet_fused/native.py shows it
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


class BuildLibraries(build_ext):
    """Builds the libraries; when that fails, leaves a note and installs the package without them."""

    def get_ext_filename(self, fullname: str) -> str:
        # Only _C is a Python module. The others are loaded by PyTorch and do not depend on Python's version.
        if fullname.endswith("._C") or fullname == "_C":
            return super().get_ext_filename(fullname)
        return os.path.join(*fullname.split(".")) + (".dylib" if sys.platform == "darwin" else ".so")

    def run(self) -> None:
        super().run()
        package = ROOT / "resnet_fused" if self.inplace else Path(self.build_lib) / "resnet_fused"
        note = package / FAILURE_NOTE
        note.unlink(missing_ok=True)
        if self.reason:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(self.reason + "\n", encoding="utf-8")

    def build_extensions(self) -> None:
        self.reason = ""
        toolkit = toolchain.find_toolkit(os.environ)
        with_cuda, line = toolchain.choose_cuda(os.environ, toolkit, CUDA_SOURCES)
        jobs = toolchain.jobs(os.environ)
        print("resnet_fused: " + line, flush=True)
        for extension in self.extensions:
            if extension.name.endswith("._cuda") and not with_cuda:
                continue
            output = Path(self.get_ext_fullpath(extension.name)).absolute()
            output.unlink(missing_ok=True)
            try:
                self._build(extension.name, output, toolkit, jobs)
            except toolchain.BuildError as error:
                what = extension.name.rpartition(".")[2]
                toolchain.leave_out(what, error, os.environ)
                print(f"resnet_fused: {what} was not compiled and is left out: {error}", file=sys.stderr, flush=True)
                if what == "_cpu":
                    self.reason = str(error)

    def _build(self, name: str, output: Path, toolkit: toolchain.Toolkit | None, jobs: int) -> None:
        settings = compilation.Settings(
            root=ROOT,
            temp=Path(self.build_temp).absolute() / "resnet_fused",
            compiler=toolchain.find_compiler(os.environ),
            torch=toolchain.require_torch(toolchain.find_torch()),
            toolkit=toolkit,
            environment=os.environ,
        )
        if name.endswith("._cpu"):
            library = compilation.cpu_library(settings, output)
        elif name.endswith("._cuda"):
            library = compilation.cuda_library(settings, output, CUDA_SOURCES)
        else:
            library = compilation.bindings(settings, output)
        compilation.run(library, settings, jobs)


def extension(name: str, sources: list[Path]) -> Extension:
    # optional: setuptools then accepts that the file is missing.
    return Extension(f"resnet_fused.{name}", [str(source.relative_to(ROOT)) for source in sources], optional=True)


extensions = [
    extension("_cpu", [ROOT / "csrc" / "ops.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]),
    extension("_C", [ROOT / "csrc" / "bindings.cpp"]),
]
if CUDA_SOURCES:
    extensions.append(extension("_cuda", CUDA_SOURCES))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibraries})
