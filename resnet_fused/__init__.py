"""Fused ResNets for PyTorch: torchvision's models and checkpoints, with each block run as one fused unit."""

from .backends import available_backends, backend, set_backend, unavailable_backends
from .blocks import BasicBlock, Bottleneck
from .convert import fuse, load, save_pretrained, unfuse
from .distributed import convert_sync_batchnorm
from .inference import optimize_for_inference
from .layers import AddReLU, ConvBNReLU
from .models import (
    ResNet,
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
from .norms import BNAddReLU2d, BNReLU2d, SyncBatchNorm
from .plans.choice import covariance, set_covariance
from .version import __version__

__all__ = [
    "AddReLU",
    "BNAddReLU2d",
    "BNReLU2d",
    "BasicBlock",
    "Bottleneck",
    "ConvBNReLU",
    "ResNet",
    "SyncBatchNorm",
    "__version__",
    "available_backends",
    "backend",
    "convert_sync_batchnorm",
    "covariance",
    "fuse",
    "load",
    "optimize_for_inference",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "save_pretrained",
    "set_backend",
    "set_covariance",
    "unavailable_backends",
    "unfuse",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
