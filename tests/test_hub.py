"""``hubconf.py``: what torch.hub finds in a checkout of this repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resnet_fused
from resnet_fused.models import BUILDERS

REPOSITORY = Path(__file__).resolve().parents[1]


def test_every_builder_is_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    # Hub lists and explains only what it downloaded: here that is this checkout.
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *args, **kwargs: str(REPOSITORY))
    assert set(torch.hub.list("owner/name", trust_repo=True)) == set(BUILDERS)
    for name in BUILDERS:
        assert torch.hub.help("owner/name", name, trust_repo=True) == BUILDERS[name].__doc__


def test_loading_with_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = resnet_fused.resnet18(num_classes=10).state_dict()
    torch.save(state, path)
    model = torch.hub.load(str(REPOSITORY), "resnet18", source="local", weights=path, num_classes=10)
    assert isinstance(model, resnet_fused.ResNet)
    assert torch.equal(model.fc.weight, state["fc.weight"])
    with torch.device("meta"):
        assert torch.hub.load(str(REPOSITORY), "resnet50", source="local").fc.out_features == 1000
    with pytest.raises(RuntimeError, match="no_such_model"):
        torch.hub.load(str(REPOSITORY), "no_such_model", source="local")


@pytest.mark.slow
def test_a_checkout_needs_no_installation(tmp_path: Path) -> None:
    """Hub puts the checkout on the path itself; without an installation nothing else brings the package."""
    code = (
        "import sys, torch\n"
        f"sys.path = [p for p in sys.path if p != {str(REPOSITORY)!r}]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__name__', repr(f)).lower()]\n"
        f"model = torch.hub.load({str(REPOSITORY)!r}, 'resnet18', source='local')\n"
        "print(sys.modules['resnet_fused'].__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == REPOSITORY / "resnet_fused"
