"""timm's registry: resfast's networks by timm's names and options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import resfast

timm = pytest.importorskip("timm", reason="timm is optional")
import resfast.timm  # noqa: E402  (needs timm)

pytestmark = pytest.mark.usefixtures("one_thread")


def images(n: int = 2, channels: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randn(n, channels, size, size)


def test_importing_resfast_imports_no_timm():
    code = "import sys, resfast; assert not {'timm', 'resfast.timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_network_with_stages_is_registered():
    want = {f"resfast_{name}" for name in resfast.list_models() if name != "simple_resnet"}
    assert set(timm.list_models("resfast_*")) == want
    assert not timm.list_pretrained("resfast_*")
    assert all(hasattr(resfast.timm, name) for name in want)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_models_are_resfasts(name):
    torch.manual_seed(0)
    model = timm.create_model(f"resfast_{name}", num_classes=7, in_chans=1, stem="cifar")
    torch.manual_seed(0)
    own = resfast.create_model(name, num_classes=7, in_channels=1, stem="cifar")
    assert type(model) is type(own)
    x = images(channels=1, size=16)
    assert torch.equal(model.eval()(x), own.eval()(x))
    assert timm.create_model(f"resfast_{name}", num_classes=0).eval()(images()).shape == (2, 512)


def test_what_timms_tools_ask_of_a_model(tmp_path: Path):
    model = timm.create_model("resfast_resnet18", num_classes=7)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 224, 224)
    assert model.get_classifier() is model.fc
    x = images()
    model.eval()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = timm.create_model(
        "resfast_resnet18", num_classes=3, checkpoint_path=str(tmp_path / "weights.pth")
    )
    assert torch.equal(loaded.eval()(x), model(x))


@pytest.mark.parametrize("out_indices", [None, (2, 3, 4), (1, 2), (-1,)])
def test_features_are_those_of_timms_own_resnet(out_indices):
    options = {"features_only": True} | ({"out_indices": out_indices} if out_indices else {})
    model = timm.create_model("resfast_resnet18", **options).eval()
    theirs = timm.create_model(
        "resnet18", features_only=True, out_indices=out_indices or (1, 2, 3, 4)
    ).eval()
    state = {k.removeprefix("model."): v for k, v in model.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert not missing
    assert model.feature_info.channels() == theirs.feature_info.channels()
    assert model.feature_info.reduction() == theirs.feature_info.reduction()
    with torch.no_grad():
        x = images()
        for got, want in zip(model(x), theirs(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_features_leave_no_parameter_without_a_gradient():
    model = timm.create_model("resfast_resnet18", features_only=True, out_indices=(1, 2))
    sum(y.sum() for y in model(images())).backward()
    assert all(p.grad is not None for p in model.parameters())
    modules = dict(model.named_modules())
    for name, channels in zip(
        model.feature_info.module_name(), model.feature_info.channels(), strict=True
    ):
        last = [m for m in modules[name].modules() if isinstance(m, nn.BatchNorm2d)][-1]
        assert last.num_features == channels


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pretrained": True}, RuntimeError, "hosts no weights"),
        ({"drop_rate": 0.1}, ValueError, "dropout"),
        ({"global_pool": "max"}, ValueError, "global_pool='max'"),
        ({"features_only": True, "out_indices": (0, 1)}, ValueError, "out_indices must lie in"),
        ({"features_only": True, "out_indices": (5,)}, ValueError, "out_indices must lie in"),
        ({"features_only": True, "out_indices": ()}, ValueError, "out_indices must lie in"),
        ({"act_layer": "silu"}, TypeError, "act_layer"),
    ],
)
def test_what_cannot_be_expressed_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        timm.create_model("resfast_resnet18", **options)
