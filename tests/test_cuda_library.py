"""The CUDA library as it was built: it loads, holds kernels of the declared operators, and says why it is not used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused import backends, native

LIBRARY = Path(native.__file__).parent / native.CUDA_LIBRARY
LAUNCHERS = Path(native.__file__).parents[1] / "csrc" / "cuda"

built = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library was not built: no nvcc on the path")


@built
def test_it_registers_a_kernel_for_every_launcher() -> None:
    """Also beside a PyTorch without CUDA: it refers to nothing that only a CUDA build has until a kernel is launched."""
    if not LAUNCHERS.is_dir():
        pytest.skip("the launchers are part of the source tree only")
    text = "".join(path.read_text(encoding="utf-8") for path in LAUNCHERS.glob("*.cu"))
    names = sorted(set(re.findall(r'm\.impl\("(\w+)"', text)))
    assert len(names) >= 18
    code = f"""
import torch, resnet_fused
torch.ops.load_library({str(LIBRARY)!r})
has = torch._C._dispatch_has_kernel_for_dispatch_key
print([name for name in {names} if not has("resnet_fused::" + name, "CUDA")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@built
def test_it_needs_no_library_of_cuda() -> None:
    """The run-time library is inside, and the driver and PyTorch's CUDA library are looked up when they are needed."""
    listed = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no readelf on the path")
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed.stdout)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search("cuda|nvrtc|cublas|python", name)]


def test_tensors_elsewhere_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._KERNELS, "cuda", backends.get("aten"))
    with backends.backend("cuda"):
        assert backends.choose(torch.device("cuda")) == "cuda"
        assert backends.choose(torch.device("cpu")) == "aten"


def test_the_reason_why_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda is None:
        assert "built without CUDA" in native._load_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native._load_cuda() == "PyTorch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    if LIBRARY.exists():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        assert "compute capability 8.0 or higher" in native._load_cuda()
    monkeypatch.setattr(native, "CUDA_LIBRARY", "_missing.so")
    assert "not compiled" in native._load_cuda()
    monkeypatch.setattr(native, "load", lambda: False)
    assert "declares its operators is missing" in native._load_cuda()
