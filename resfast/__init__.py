"""resfast: fused Conv + BatchNorm + ReLU + residual for ResNets, in training and inference."""

__version__ = "0.1.0"

from resfast import native
from resfast.backends import backend
from resfast.backends.packed import clear_packed_weights
from resfast.ops import strict

native.warn_if_unavailable()

__all__ = [
    "__version__",
    "backend",
    "clear_packed_weights",
    "strict",
]
