"""What is left when something is missing on a GPU: the stock answer, and ``resnet-fused info`` says why.

There is no GPU here. A process is told of one before it imports the package; the processor stands in for it where tensors are.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_cases import BLOCKS, block, compare
from chain_cases import CASES, tv
from chain_cases import compare as compare_cases
from route_cases import Pretended, convolutions, forget, formulas, pretend, signatures, with_space_to_depth

import resnet_fused
from resnet_fused import backends, info, native, routes, tables
from resnet_fused.backends import routed
from resnet_fused.backends.aten import AtenKernels
from resnet_fused.backends.cuda import CudaConvolutionKernels, CudaKernels, cuda_kernels
from resnet_fused.backends.triton import devices

PACKAGE = Path(resnet_fused.__file__).parent

# A child process: PyTorch with a GPU that it cannot use, then a block under auto, on a processor that stands in for the GPU.
CHILD = """\
import json, os, sys
from types import SimpleNamespace
import torch
CAPABILITY, WITHOUT = (9, 0), ()
{prelude}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in WITHOUT:
            raise ImportError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Missing())
def capability():
    if isinstance(CAPABILITY, Exception):
        raise CAPABILITY
    return CAPABILITY
torch.version.cuda = "12.8"
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_name = lambda device=None: "Pretended GPU"
torch.cuda.get_device_capability = lambda device=None: capability()
torch.cuda.get_device_properties = lambda device: SimpleNamespace(
    name="Pretended GPU", major=7, minor=5, multi_processor_count=40)
import resnet_fused
quick = "torch._dynamo" not in sys.modules
from resnet_fused import backends, info, operators, routes
found = info.collect()
routes.applies = lambda device: True
def unexpected(*args):
    raise AssertionError("an operator ran")
operators.chain = operators.add_relu = unexpected
torch.manual_seed(0)
model = resnet_fused.Bottleneck(16, 4)
x = torch.randn(2, 16, 6, 5)
children = model.conv1, model.bn1, model.relu, model.conv2, model.bn2, model.relu, model.conv3, model.bn3
y = torch.nn.Sequential(*children)(x)
stock = torch.relu(y + x)
print(json.dumps([found, torch.equal(model(x), stock), quick]))
"""


def child(prelude: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", CHILD.format(prelude=prelude)],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(folder), tables.ENVIRONMENT_VARIABLE: "none.json"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package without the libraries of GPU kernels, as where no nvcc was found."""
    folder = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns("__pycache__", native.CUDA_LIBRARY)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignored)
    return folder


@pytest.mark.parametrize(
    "prelude, triton, cuda",
    [
        ("WITHOUT = ('triton',)", "Triton cannot be imported: ImportError: No module named 'triton'", "not compiled"),
        ("CAPABILITY = (7, 5)", "compute capability 8.0 or higher", "not compiled"),
        pytest.param(
            "CAPABILITY = RuntimeError('driver too old')",
            "PyTorch cannot use the GPU: driver too old",
            "not compiled",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["no Triton", "old GPU", "no driver"],
)
def test_a_process_without(prelude: str, triton: str, cuda: str, copied: Path) -> None:
    done = child(prelude, copied)
    assert done.returncode == 0, done.stderr
    found, is_stock, is_quick = json.loads(done.stdout)
    assert is_stock
    assert is_quick, "the import takes in the compiler, which takes seconds"
    assert triton in found["backends"]["triton"] and cuda in found["backends"]["cuda"]
    assert found["chosen"] == {
        "cpu": "cpu" if native.is_loaded() else "aten",
        "cuda": "as measured, else stock modules",
    }
    assert found["measured"] == {
        "Pretended GPU": "0 routes for this GPU; everything runs as stock PyTorch modules (resnet-fused tune measures)"
    }


@pytest.mark.slow
def test_a_process_that_asks_for_what_is_not_there(copied: Path) -> None:
    done = child("WITHOUT = ('triton',)", copied, RESNET_FUSED_BACKEND="triton")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "RESNET_FUSED_BACKEND: backend 'triton' is not available: Triton cannot be imported" in last


# One rung at a time, in this process


def test_why_triton_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    # What a Triton without some name, or with a library that does not load, raises in the middle of the import.
    module = f"{backends.__name__}.triton.dispatch"
    monkeypatch.setitem(sys.modules, module, None)
    assert "Triton cannot be imported: ModuleNotFoundError: " in backends.load_triton()
    assert type(cuda_kernels()) is CudaConvolutionKernels
    broken = type(sys)(module)
    broken.__getattr__ = lambda name: {}[name]
    monkeypatch.setitem(sys.modules, module, broken)
    assert "Triton cannot be imported: KeyError: " in backends.load_triton()
    assert type(cuda_kernels()) is CudaConvolutionKernels

    def no_driver() -> None:
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "get_device_capability", no_driver)
    assert backends.load_triton() == "PyTorch cannot use the GPU: the driver is too old"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch with CUDA, and a GPU."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.usefixtures("seen")
def test_why_the_extension_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not native.is_loaded():
        pytest.skip("nothing is compiled")
    monkeypatch.setattr(native, "_HERE", tmp_path)
    assert native._load_cuda().startswith("not compiled: run 'pip install .'")
    (tmp_path / native.CUDA_LIBRARY).write_bytes(b"no library")
    assert native._load_cuda().startswith("_cuda.so could not be loaded: ")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "8.0 or higher" in native._load_cuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native._load_cuda() == "PyTorch sees no GPU"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in native._load_cuda()
    monkeypatch.setattr(native, "_status", "not compiled: because")
    assert native._load_cuda() == "the library that declares its operators is missing: not compiled: because"


@pytest.mark.parametrize(
    "there, cudnn, others",
    [
        ((), AtenKernels, {}),
        (("cuda",), CudaKernels, {"cuda": CudaConvolutionKernels}),
        (("triton",), "TritonPasses", {"triton": "TritonKernels"}),
        (("cuda", "triton"), CudaKernels, {"cuda": CudaConvolutionKernels, "triton": "CudaAndTritonKernels"}),
    ],
)
def test_providers(there: tuple, cudnn: object, others: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """What routes may lead to, by what is there."""
    if "triton" in there and not importlib.util.find_spec("triton"):
        pytest.skip("no Triton")
    monkeypatch.setattr(backends, "_KERNELS", {"aten": AtenKernels(), **dict.fromkeys(there)})
    found = backends.providers.__wrapped__()
    name_of = {
        key: kind if isinstance(kind, str) else kind.__name__ for key, kind in {"cudnn": cudnn, **others}.items()
    }
    deep, recast = (type(found.pop(name)) for name in (routed.SPACE_TO_DEPTH, routed.CUBLAS))
    assert {key: type(kernels).__name__ for key, kernels in found.items()} == name_of
    base = type(found["cudnn"])
    assert all(issubclass(kind, base) and kind.__mro__[2] is base for kind in (deep, recast))


def test_no_import_and_no_step_on_a_processor_starts_cuda() -> None:
    """A process may still fork, and a rank choose its GPU, after it has imported the package."""
    code = """if True:
        import torch
        def started(*args):
            raise AssertionError("CUDA was started")
        torch.cuda._lazy_init = torch.cuda.get_device_capability = torch.cuda.current_device = started
        torch.cuda.is_available = started
        import resnet_fused
        model = resnet_fused.fuse(resnet_fused.convert_sync_batchnorm(resnet_fused.resnet18()))
        torch.cuda.is_available = lambda: False  # which PyTorch's own loss.backward() may ask
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        assert not resnet_fused.backends._probe.cache_info().currsize
    """
    subprocess.run([sys.executable, "-c", code], check=True)


# What the kernels do not take, on a route that leads to them


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """With Triton's kernels where they can be interpreted, without the extension."""
    providers = formulas()
    if "triton" in backends.available_backends():
        from resnet_fused.backends.triton.dispatch import TritonKernels, TritonPasses

        kernels = {routed.CUDNN: TritonPasses(), routed.TRITON: TritonKernels(own_conv3x3=True)}
        providers = with_space_to_depth(kernels)
    yield from pretend(monkeypatch, providers)


SMALL = {"conv-1x1-no-relu": (2, 17, 2, 3), "bn-3-channels": (2, 3, 3, 5), "add": (2, 17, 3, 5)}


@pytest.mark.parametrize(
    "name",
    [*SMALL, *(pytest.param(n, marks=pytest.mark.slow) for n in ("conv-grouped-dilated", "basic-projection", "stem"))],
)
def test_odd_channels_and_layouts(name: str, gpu: Pretended) -> None:
    """17 and 35 channels, odd extents, groups, in both layouts."""
    case = CASES[name]
    if name in SMALL:
        case = replace(case, shapes=(SMALL[name],) * len(case.shapes))
    for layout in (torch.contiguous_format, torch.channels_last):
        ours, stock = case.pair()
        gpu.choice = routed.name_of(dict.fromkeys(convolutions(ours), "triton"))
        compare_cases(ours, stock, case.inputs(torch.float32, layout), torch.float32)
        assert gpu.ran.pop() == gpu.choice


def test_float64(gpu: Pretended) -> None:
    gpu.choice = routed.name_of(dict.fromkeys(signatures("bottleneck-strided"), "triton"))
    stock, ours = (block(source, *BLOCKS["bottleneck-strided"]) for source in (tv, resnet_fused))
    ours.load_state_dict(stock.state_dict())
    compare(ours, stock, torch.randn(2, 24, 7, 6), True, torch.float64, "auto")
    assert gpu.ran == [gpu.choice]


# Tables


def told() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return info._measured(torch.device("cpu"))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The user's table, of a processor that stands in for a GPU."""
    monkeypatch.setattr(routes, "applies", lambda device: backends.current() == "auto")
    monkeypatch.setattr(devices, "describe", lambda device: devices.DEVICES["H200"])
    monkeypatch.setattr(tables, "_warned", set())
    monkeypatch.setenv(tables.ENVIRONMENT_VARIABLE, str(tmp_path / "table.json"))
    forget()
    yield tmp_path / "table.json"
    monkeypatch.undo()
    forget()


def key(x: torch.Tensor) -> str:
    """Of the only chain that these tests run."""
    version = ".".join(torch.__version__.split(".")[:2])
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    where = f"m2^{(rows - 1).bit_length()} {x.shape[2]}x{x.shape[3]}"
    return f"train float32 {where} [16x16x3x3/1:r 16x16x3x3/1:] identity relu sm_90 132 torch{version}"


def is_stock(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    ran = []
    original = resnet_fused.operators.chain
    with monkeypatch.context() as patch:
        patch.setattr(resnet_fused.operators, "chain", lambda *args: ran.append(1) or original(*args))
        stock, ours = (block(source, *BLOCKS["basic"]) for source in (tv, resnet_fused))
        ours.load_state_dict(stock.state_dict())
        torch.testing.assert_close(ours(x), stock(x))
    return not ran


def test_a_route_is_taken_and_told(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 16, 8, 8)
    assert is_stock(x, monkeypatch)
    assert told().startswith("0 routes") and told().endswith(
        "everything runs as stock PyTorch modules (resnet-fused tune measures)"
    )
    routes.add(table, {key(x): routes.Entry("routed", 1.0, {}), "train of another GPU": routes.Entry("routed", 1, {})})
    forget()
    assert not is_stock(x, monkeypatch)
    assert is_stock(torch.randn(2, 16, 8, 4), monkeypatch)
    assert told().startswith("1 routes") and "everything else runs as stock" in told()
    assert info._tables()[str(table)] == "2 routes, 0 Triton configurations"
    with resnet_fused.backend("aten"):
        assert "routes are not asked: the backend is 'aten'" in told()


@pytest.mark.parametrize("choice", ["routed 16x16x3x3/1=elsewhere", "routed 16x16x3x3/1", "gone"])
def test_a_route_to_what_is_not_here(choice: str, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 16, 8, 8)
    routes.add(table, {key(x): routes.Entry(choice, 1.0, {})})
    forget()
    assert is_stock(x, monkeypatch)
    assert "1 routes, of which 1 cannot be taken (" in told() and choice.split("=")[-1] in told()
    assert "; everything runs as stock" in told()


WHOLE = {"kind": tables.KIND, "format": 1, "entries": {}, "routes": {}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"kind": "resnet_fused.tuning"',
        b"[" * 100_000,
        json.dumps(WHOLE | {"format": 2}).encode(),
        json.dumps(WHOLE | {"routes": None}).encode(),
        json.dumps(WHOLE | {"routes": {"a": "b"}}).encode(),
        json.dumps(WHOLE | {"routes": {"a": {"choice": 1, "us": 1.0, "others": {}}}}).encode(),
        json.dumps(WHOLE | {"routes": {"a": {"choice": "stock", "us": -1, "others": {}}}}).encode(),
        json.dumps(WHOLE | {"routes": {"a": {"choice": "stock", "us": 10**400, "others": {}}}}).encode(),
        json.dumps(WHOLE | {"routes": {"a": {"choice": "stock", "us": 1, "others": {"b": []}}}}).encode(),
    ],
)
def test_a_corrupt_table(content: bytes, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignored with one warning; the answer is stock's, and ``info`` names the file and what is wrong with it."""
    table.write_bytes(content)
    x = torch.randn(2, 16, 8, 8)
    with pytest.warns(RuntimeWarning, match="the tuning table .* is ignored"):
        assert is_stock(x, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forget()
        assert is_stock(x, monkeypatch)
    assert info._tables()[str(table)].startswith("ignored: ")
    assert told().startswith("0 routes")


def test_a_table_that_cannot_be_read(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert info._tables()[str(table)] == "no such file"
    table.mkdir()
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert is_stock(torch.randn(2, 16, 8, 8), monkeypatch)
    assert info._tables()[str(table)].startswith("ignored: ")


def test_nobodys_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user may have none: there is no table then, and no error."""
    for name in ("HOME", "XDG_CACHE_HOME", tables.ENVIRONMENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    pwd = pytest.importorskip("pwd", reason="homes are looked up there")

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert tables.read(tables.user_table(), tables.parse) == {}
