"""torch.hub: ``torch.hub.load(REPOSITORY, "resnet50", weights=...)``. The package must be built or installed for its kernels."""

dependencies = ["torch", "numpy"]

from resnet_fused import (  # noqa: E402  (hub reads ``dependencies`` first)
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
