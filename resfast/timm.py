"""``import resfast.timm`` registers resfast's networks with timm as ``resfast_<name>``.

timm's names for the options: ``num_classes``, ``in_chans``, ``drop_path_rate``, ``output_stride``,
``features_only`` with ``out_indices``. Other keywords are resfast's own (``stem``, ``se``, …).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureInfo, generate_default_cfgs, register_model
from torch import Tensor, nn

from resfast.models import create_model, list_models
from resfast.models.backbone import STAGES, Backbone

_PREFIX = "resfast_"
_NAMES = [name for name in list_models() if name != "simple_resnet"]  # it has no stages

default_cfgs = generate_default_cfgs(
    {
        _PREFIX + name: {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for name in _NAMES
    }
)


class StageFeatures(nn.Module):
    """The outputs of some stages, as timm's ``features_only=True``: a list of maps.

    ``out_indices`` count as in timm's ResNets: 1 … 4 are layer1 … layer4 (negative from the end).
    They come in the network's order; stages behind the last one are left out.
    ``feature_info`` is timm's.
    """

    def __init__(self, model: Backbone, out_indices: Sequence[int]) -> None:
        super().__init__()
        self.out_indices = tuple(sorted(i + 5 if i < 0 else i for i in out_indices))
        if not self.out_indices or not all(1 <= i <= 4 for i in self.out_indices):
            raise ValueError(
                f"out_indices must lie in 1 … 4, got {tuple(out_indices)}: "
                "the stem's output before its max-pool (0) is never in memory"
            )
        info = [{"num_chs": 64, "reduction": 1, "module": "stem"}]
        info += [
            {"num_chs": i.channels, "reduction": i.reduction, "module": f"model.{i.name}"}
            for i in model.feature_info
        ]
        self.feature_info = FeatureInfo(info, self.out_indices)
        for unused in STAGES[max(self.out_indices) :]:
            setattr(model, unused, nn.Identity())
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        stages = self.model.forward_stages(x)
        return [stages[i - 1] for i in self.out_indices]


def _build(
    name: str,
    pretrained: bool,
    *,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
    features_only: bool = False,
    out_indices: Sequence[int] = (1, 2, 3, 4),
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **options: Any,
) -> nn.Module:
    if pretrained:
        raise RuntimeError(
            f"resfast hosts no weights for {name}: "
            "load torchvision's with load_state_dict, or pass checkpoint_path"
        )
    if drop_rate:
        raise ValueError(f"drop_rate={drop_rate}: resfast's classifiers have no dropout")
    if global_pool != "avg":
        raise ValueError(f"global_pool={global_pool!r}: resfast's networks average")
    options |= {"in_channels": in_chans, "drop_path": drop_path_rate}
    model: Any = create_model(name, features_only=features_only, **options)
    if features_only:
        model = StageFeatures(model, out_indices)
    cfg = default_cfgs[_PREFIX + name].default.to_dict()
    model.pretrained_cfg = model.default_cfg = cfg | {"architecture": _PREFIX + name}
    return model


def _entrypoint(name: str) -> Any:
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        return _build(name, pretrained, **options)

    build.__name__ = build.__qualname__ = _PREFIX + name
    build.__doc__ = f"resfast.{name} by timm's names of the options."
    return register_model(build)


for _name in _NAMES:
    globals()[_PREFIX + _name] = _entrypoint(_name)
