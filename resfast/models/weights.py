"""Loading parameters into a freshly built model."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn


def num_classes_of(weights: Any) -> int | None:
    """Class count that a weights enumeration's meta data declares, or None."""
    meta = getattr(weights, "meta", None)
    return len(meta["categories"]) if isinstance(meta, dict) and "categories" in meta else None


def load_weights(model: nn.Module, weights: Any, progress: bool = True) -> nn.Module:
    """Load ``weights`` strictly into model and return it.

    Args:
        weights: None (nothing happens), the path of a local state_dict file, or an object with
            torchvision's ``get_state_dict(progress=...)``.

    Raises:
        FileNotFoundError: a path that is not a file. TypeError: anything else.
        RuntimeError: keys or shapes differ from the model's.
    """
    if weights is None:
        return model
    if isinstance(weights, (str, os.PathLike)):
        if not os.path.isfile(weights):
            raise FileNotFoundError(
                f"weights={os.fspath(weights)!r} is not a file; pass the path of a local "
                "state_dict, or a weights enumeration of torchvision (resfast hosts no weights)"
            )
        state = torch.load(weights, map_location="cpu", weights_only=True)
    elif callable(getattr(weights, "get_state_dict", None)):
        state = weights.get_state_dict(progress=progress)
    else:
        raise TypeError(
            "weights must be None, the path of a local state_dict file or an object with "
            f"get_state_dict(), got {type(weights).__name__}"
        )
    model.load_state_dict(state)
    return model
