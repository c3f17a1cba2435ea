"""What the build finds, what it refuses and what it says; nothing here compiles for long."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "build_backend").is_dir():
    pytest.skip("the build backend is part of the source tree only", allow_module_level=True)
sys.path.insert(0, str(ROOT / "build_backend"))

import compilation  # noqa: E402
import resnet_fused_build  # noqa: E402
import toolchain  # noqa: E402


def settings(tmp_path: Path, **environment: str) -> compilation.Settings:
    torch = toolchain.Torch(tmp_path / "torch", "2.10.0")
    return compilation.Settings(ROOT, tmp_path / "temp", ["c++"], torch, None, environment)


def fake_nvcc(folder: Path, release: str) -> None:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)


def test_installed_torch_is_found_and_not_asked_for_again():
    torch = toolchain.find_torch()
    assert torch is not None
    assert all(folder.is_dir() for folder in torch.include)
    requirements = resnet_fused_build.get_requires_for_build_wheel()
    requirements += resnet_fused_build.get_requires_for_build_editable()
    assert not any("torch" in requirement for requirement in requirements)


def test_torch_is_found_where_the_isolated_build_hides_it(monkeypatch):
    if not (Path(sysconfig.get_path("purelib")) / "torch").is_dir():
        pytest.skip("PyTorch belongs to another environment than the interpreter's own (--system-site-packages)")
    found = toolchain.find_torch()
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    assert toolchain.find_torch() == found


def test_torch_is_asked_for_only_when_there_is_none(monkeypatch):
    monkeypatch.setattr(toolchain, "find_torch", lambda: None)
    assert "torch>=2.10" in resnet_fused_build.get_requires_for_build_wheel()
    with pytest.raises(toolchain.BuildError, match="no PyTorch"):
        toolchain.require_torch(None)


def test_old_torch_is_refused(tmp_path):
    for folder in ("include", "lib"):
        (tmp_path / folder).mkdir()
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    with pytest.raises(toolchain.BuildError, match=r"2\.9\.1.*too old"):
        toolchain.require_torch(toolchain.torch_at(tmp_path))


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("9.0", ["sm_90"]),
        ("8.0;9.0a+PTX", ["sm_80", "sm_90a", "compute_90a"]),
        ("8.0 8.6", ["sm_80", "sm_86"]),
        ("Hopper", ["sm_90", "compute_90"]),
        ("9.0;9.0", ["sm_90"]),
    ],
)
def test_architecture_list(text, codes):
    assert [option.rpartition("=")[2] for option in toolchain.parse_architectures(text)] == codes


def test_default_architectures_are_those_that_the_toolkit_knows(tmp_path):
    def codes(*known: str) -> list[str]:
        options = toolchain.gencode({}, toolchain.Toolkit(tmp_path, "13.0", frozenset(known)))
        return [option.rpartition("=")[2] for option in options]

    everything = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]
    assert codes() == codes("75", "80", "86", "89", "90", "100", "103", "120") == everything
    assert codes("80", "86", "89", "90") == ["sm_80", "sm_86", "sm_89", "sm_90", "compute_90"]
    assert toolchain.gencode({"TORCH_CUDA_ARCH_LIST": "9.0"}, None) == ["-gencode=arch=compute_90,code=sm_90"]


@pytest.mark.parametrize("text", ["sm_90", "9", "9.0+ptxx", "8.0;kepler9"])
def test_architecture_list_that_cannot_be_read(text):
    with pytest.raises(toolchain.ConfigurationError, match=r"TORCH_CUDA_ARCH_LIST.*got"):
        toolchain.parse_architectures(text)


def test_toolkit_is_found_by_its_compiler_not_by_a_gpu(tmp_path):
    fake_nvcc(tmp_path / "home", "13.0")
    fake_nvcc(tmp_path / "path", "12.8")
    on_path = {"PATH": str(tmp_path / "path" / "bin") + ":/bin:/usr/bin"}
    assert toolchain.find_toolkit({**on_path, "CUDA_HOME": str(tmp_path / "home")}).version == "13.0"
    assert toolchain.find_toolkit(on_path).version == "12.8"
    assert toolchain.find_toolkit({**on_path, "CUDA_HOME": str(tmp_path)}) is None
    assert toolchain.find_toolkit({"PATH": str(tmp_path)}) is None


def test_force_cuda_without_a_toolkit_fails_clearly():
    with pytest.raises(toolchain.ConfigurationError, match=r"FORCE_CUDA=1.*no CUDA toolkit.*CUDA_HOME"):
        toolchain.choose_cuda({"FORCE_CUDA": "1"}, None, [])
    for value in ("0", ""):
        wanted, line = toolchain.choose_cuda({"FORCE_CUDA": value}, None, [])
        assert not wanted
        assert "no toolkit" in line


def test_force_cuda_makes_a_cuda_library_that_does_not_compile_an_error():
    error = toolchain.BuildError("nvcc failed: no memory")
    with pytest.raises(toolchain.ConfigurationError, match=r"FORCE_CUDA=1.*nvcc failed: no memory"):
        toolchain.leave_out("_cuda", error, {"FORCE_CUDA": "1"})
    toolchain.leave_out("_cuda", error, {})
    toolchain.leave_out("_cpu", error, {"FORCE_CUDA": "1"})


def test_one_line_says_what_was_found(tmp_path):
    toolkit = toolchain.Toolkit(tmp_path / "nvcc", "13.0")
    wanted, line = toolchain.choose_cuda({}, toolkit, [])
    assert not wanted
    assert "13.0" in line
    wanted, line = toolchain.choose_cuda({"TORCH_CUDA_ARCH_LIST": "9.0a"}, toolkit, [tmp_path / "kernel.cu"])
    assert wanted
    assert "sm_90a" in line
    assert "\n" not in line


def test_max_jobs():
    assert toolchain.jobs({"MAX_JOBS": "3"}) == 3
    assert toolchain.jobs({}) >= 1
    for value in ("many", "0", "-1"):
        with pytest.raises(toolchain.ConfigurationError, match="MAX_JOBS"):
            toolchain.jobs({"MAX_JOBS": value})


def test_missing_compiler_is_named(monkeypatch):
    with pytest.raises(toolchain.BuildError, match="no-such-compiler"):
        toolchain.find_compiler({"CXX": "no-such-compiler"})
    monkeypatch.setattr(toolchain.shutil, "which", lambda *args, **options: None)
    with pytest.raises(toolchain.BuildError, match=r"no C\+\+ compiler"):
        toolchain.find_compiler({})


def test_debug_and_user_flags(tmp_path):
    assert settings(tmp_path, DEBUG="1").optimisation == ["-O0", "-g"]
    assert "-O2" in settings(tmp_path, DEBUG="0").optimisation
    command = compilation.cpu_library(settings(tmp_path, CXXFLAGS="-DX='a b'"), tmp_path / "_cpu.so").objects[0].command
    assert "-DX=a b" in command
    assert "-ffp-contract=off" in command
    assert "-ffast-math" not in command


def test_each_instruction_set_is_compiled_with_its_own_flags(tmp_path, monkeypatch):
    for x86 in (True, False):
        monkeypatch.setattr(compilation, "is_x86", lambda x86=x86: x86)
        library = compilation.cpu_library(settings(tmp_path), tmp_path / "_cpu.so")
        commands = {step.inputs[0].stem: step.command for step in library.objects}
        assert ("kernels_avx512" in commands) == x86
        with_avx = {name for name, command in commands.items() if any(word.startswith("-mavx") for word in command)}
        assert with_avx == ({"kernels_avx2", "kernels_avx512", "kernels_avx512bf16"} if x86 else set())


def test_ninja_file_escapes_paths(tmp_path):
    step = compilation.Step(["c++", "a b.cpp", "$x"], [Path("a b.cpp")], Path("c:d.o"))
    text = compilation.ninja_file([step], tmp_path)
    assert "build c$:d.o: r0 a$ b.cpp" in text
    assert "$$x" in text


@pytest.mark.parametrize("with_ninja", [True, False])
def test_a_failing_source_is_named_with_its_error(tmp_path, monkeypatch, with_ninja):
    if with_ninja and compilation.find_ninja() is None:
        pytest.skip("ninja is not installed")
    if not with_ninja:
        monkeypatch.setattr(compilation, "find_ninja", lambda: None)
    try:
        compiler = toolchain.find_compiler({})
    except toolchain.BuildError as error:
        pytest.skip(str(error))
    source = tmp_path / "broken.cpp"
    source.write_text("int main() { return oops; }\n")
    output = tmp_path / "broken.o"
    step = compilation.Step([*compiler, "-c", str(source), "-o", str(output)], [source], output)
    link = compilation.Step([*compiler, str(step.output)], [step.output], tmp_path / "broken.so")
    with pytest.raises(toolchain.BuildError, match="oops"):
        compilation.run(compilation.Library([step], link), settings(tmp_path), 1)


def test_source_distribution_has_all_sources():
    manifest = (ROOT / "MANIFEST.in").read_text()
    for suffix in {path.suffix for path in (ROOT / "csrc").rglob("*") if path.is_file()}:
        assert "*" + suffix in manifest
    assert "build_backend" in manifest
