"""torch.hub: ``torch.hub.load(REPOSITORY, "resnet50", weights=...)``. The package must be built or installed for its kernels."""

dependencies = ["torch", "numpy"]

from resnet_fused.models import BUILDERS  # noqa: E402  (hub reads ``dependencies`` first)

globals().update(BUILDERS)
