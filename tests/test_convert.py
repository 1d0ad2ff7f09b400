"""accelerate and restore: hand-written forwards, what is refused, what stays as it was."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from converted import check
from model_step import (
    assert_same,
    images,
    randomise,
    step,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import resfast
from resfast import accelerate, restore
from resfast.nn import BasicBlock, set_fused, unfused

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- hand-written models


class Handwritten(nn.Module):
    """Sequential, functional and in-place spellings, a pre-activation, and ``view``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.pre = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.conv4 = nn.Conv2d(8, 8, 3, padding="same")
        self.bn4 = nn.BatchNorm2d(8, eps=1e-2, momentum=None)
        self.fc = nn.Linear(8 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        x = torch.relu(y)
        y = self.conv3(self.act(self.pre(x)))
        y = torch.add(self.bn4(self.conv4(y)), x).relu_()
        y = F.adaptive_avg_pool2d(y, 3)
        return self.fc(y.view(y.size(0), -1))


def handwritten() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Handwritten())


X = images(2, 3, 12, 10)


def ops(report: resfast.convert.Report) -> dict[str, str]:
    """Children → op of what was fused."""
    return {" ".join([r.module, *r.children]): r.op for r in report.fused}


def test_handwritten_model():
    report = check(handwritten(), X)
    assert ops(report) == {
        "stem 0 1": "conv_bn_act",
        "Handwritten conv1 bn1 conv2 bn2": "residual_block",
        "Handwritten pre": "bn_act",
        "Handwritten conv4 bn4": "conv_bn_act",
    }
    assert [(r.module, r.op) for r in report.left] == [("conv3", "unfused")]
    assert "4 fused, 1 left" in str(report)
    assert "no batch norm" in str(report)


class Graph(nn.Module):
    """A convolution, a norm, and a forward given as a function of (module, x)."""

    def __init__(self, function, **attributes) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.skip = nn.Identity()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _z(m: Graph, x: Tensor) -> Tensor:
    return m.norm(m.conv(x))


def _twice_used(m, x):
    y = _z(m, x)
    return F.relu(y) + y.mean()


def _adds_into_the_input(m, x):
    a = x * 1
    b = a
    b += _z(m, x)
    return b * a


FORWARDS = {
    "relu-module": (lambda m, x: m.relu(_z(m, x)), {"conv norm": "conv_bn_act"}),
    "method": (lambda m, x: _z(m, x).relu(), {"conv norm": "conv_bn_act"}),
    "plus": (lambda m, x: F.relu(_z(m, x) + x), {"conv norm": "conv_bn_act"}),
    "plus-reversed": (lambda m, x: F.relu(x + _z(m, x)), {"conv norm": "conv_bn_act"}),
    "add-method": (lambda m, x: _z(m, x).add(x), {"conv norm": "conv_bn_act"}),
    "add-alpha": (lambda m, x: torch.add(_z(m, x), x, alpha=2), {"conv norm": "conv_bn_act"}),
    "add-number": (lambda m, x: F.relu(_z(m, x) + 1), {"conv norm": "conv_bn_act"}),
    "add-itself": (lambda m, x: (lambda y: F.relu(y + y))(_z(m, x)), {"conv norm": "conv_bn_act"}),
    "add-broadcasts": (
        lambda m, x: F.relu(_z(m, x) + x.mean((2, 3), keepdim=True)),
        {"conv norm": "conv_bn_act"},
    ),
    "add-is-broadcast": (
        lambda m, x: F.relu(m.norm(x[:, :, :1, :1]) + x),
        {"norm": "bn_act"},
    ),
    "norm-relu": (lambda m, x: F.relu(m.norm(x)), {"norm": "bn_act"}),
    "norm-add-relu": (lambda m, x: F.relu(m.norm(x) + x), {"norm": "bn_act"}),
    "norm-alone": (lambda m, x: m.norm(x) * m.conv(x), {}),
    "norm-relu-add": (lambda m, x: F.relu(_z(m, x)) + x, {"conv norm": "conv_bn_act"}),
    "max-pool": (lambda m, x: m.pool(F.relu(_z(m, x))), {"conv norm pool": "conv_bn_act_max_pool"}),
    "pool-of-norm": (lambda m, x: m.pool(m.norm(x)), {}),
    "pool-twice-read": (
        lambda m, x: (lambda y: m.pool(y) + y.mean())(m.relu(_z(m, x))),
        {"conv norm": "conv_bn_act"},
    ),
    "conv-twice-read": (
        lambda m, x: (lambda z: F.relu(m.norm(z)) + z.mean())(m.conv(x)),
        {"norm": "bn_act"},
    ),
    "identities": (
        lambda m, x: m.relu(m.skip(m.norm(m.skip(m.conv(m.skip(x)))))),
        {"conv norm": "conv_bn_act"},
    ),
    "twice-used": (_twice_used, {"conv norm": "conv_bn_act"}),
    "adds-into-input": (_adds_into_the_input, {"conv norm": "conv_bn_act"}),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forward_of_every_spelling(name):
    function, want = FORWARDS[name]
    torch.manual_seed(0)
    got = ops(check(randomise(Graph(function)), images(4, 3, 6, 5)))
    assert got == {f"Graph {children}": op for children, op in want.items()}


def _writes_by_method(m, x):
    y = _z(m, x)
    x.mul_(0.5)
    return F.relu(y + x)


def _writes_by_operator(m, x):
    y = _z(m, x)
    x *= 0.5
    return F.relu(y + x)


def _writes_by_function(m, x):
    y = _z(m, x)
    return F.relu(y + F.relu(x, inplace=True))


def _writes_by_module(m, x):
    y = _z(m, x)
    return F.relu(y + m.act(x))


def _writes_out(m, x):
    y = _z(m, x)
    return F.relu(y + torch.mul(x, 0.5, out=x))


def _writes_before_the_norm(m, x):
    z = m.conv(x)
    x.mul_(0.5)
    return F.relu(m.norm(z))


WRITES = [
    _writes_before_the_norm,
    _writes_by_method,
    _writes_by_operator,
    _writes_by_function,
    _writes_by_module,
    _writes_out,
]


@pytest.mark.parametrize("function", WRITES)
def test_what_is_written_between_convolution_and_addition_is_not_read_early_or_late(function):
    """Without gradients: with them stock refuses such a forward."""
    torch.manual_seed(0)
    model = randomise(Graph(function, act=nn.ReLU(inplace=True))).eval()
    stock = copy.deepcopy(model)
    assert ops(accelerate(model)) == {"Graph conv norm": "conv_bn_act"}
    ours, theirs = (images(4, 3, 6, 5) for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(model(ours), stock(theirs))
    torch.testing.assert_close(ours, theirs)


class Shortcuts(nn.Module):
    """Two layers and a shortcut of a given kind, added on the side given."""

    def __init__(self, shortcut: nn.Module, first: bool) -> None:
        super().__init__()
        self.first = first
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.shortcut = shortcut
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            r = self.shortcut(x)
            return F.relu(r + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class Pad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 3))


SHORTCUTS = {
    "projection": lambda: nn.Sequential(nn.Conv2d(3, 6, 1, 2, bias=False), nn.BatchNorm2d(6)),
    "pooled": lambda: nn.Sequential(
        nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
    ),
    "padded": Pad,
    "biased": lambda: nn.Sequential(nn.Conv2d(3, 6, 1, 2), nn.BatchNorm2d(6)),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", SHORTCUTS)
def test_block_with_shortcut(kind, first):
    torch.manual_seed(0)
    model = randomise(Shortcuts(SHORTCUTS[kind](), first))
    report = check(model, images(2, 3, 7, 6))
    (block,) = (r for r in report.fused if r.op == "residual_block")
    assert block.children[:4] == ("conv1", "norm1", "conv2", "norm2")
    assert ("shortcut.0" in " ".join(block.children)) == (kind == "projection") or kind == "pooled"


def test_block_keeps_apart_what_broadcasts():
    """A one-channel input as its own shortcut."""

    class Gray(Shortcuts):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
            return F.relu(y + x[:, :1, ::2, ::2])

    torch.manual_seed(0)
    report = check(randomise(Gray(nn.Identity(), False)), images(2, 3, 8, 6))
    assert "residual_block" in ops(report).values()


# ---- what a trace must not take for granted


def graph(function, **attributes) -> Graph:
    torch.manual_seed(0)
    return randomise(Graph(function, **attributes)).double()


X64 = images(2, 3, 6, 5, dtype=torch.float64)


def test_attributes_are_compared_on_every_call():
    def function(m, x):
        y = F.relu(_z(m, x))
        return y * m.factor if m.scales[0] else y

    model = graph(function, factor=2.0, scales=[True])
    stock = copy.deepcopy(model)
    accelerate(model)
    assert model.plan()[0].op == "conv_bn_act"
    for factor, scales in ((2.0, [True]), (3.0, [True]), (3.0, [False])):
        for m in (model, stock):
            m.factor, m.scales[:] = factor, scales
        assert_same(step(model, X64), step(stock, X64))
    (row,) = model.plan()
    assert (row.op, row.reason) == ("unfused", "scales has changed since accelerate")


def test_training_and_eval_may_differ():
    def function(m, x):
        y = F.relu(_z(m, x))
        return y + 1 if m.training else F.relu(m.other(y))

    model = graph(function, other=nn.BatchNorm2d(3))
    report = accelerate(model)
    stock = unfused(model)
    for mode in (True, False):
        model.train(mode), stock.train(mode)
        assert_same(step(model, X64), step(stock, X64))
        assert [row.op for row in model.plan()] == ["conv_bn_act"] + ["bn_act"] * (not mode)
    assert len(report.fused) == 2


def test_children_added_later_are_called():
    model = handwritten().double()
    accelerate(model)
    model.stem.append(nn.Tanh())
    stock = unfused(model)
    assert_same(step(model, X.double()), step(stock, X.double()))
    assert model.stem.plan() == [(("0", "1"), "unfused", "children were added or removed")]
    assert "Handwritten" in str(accelerate(model))  # and traces it anew
    assert model.stem.plan()[0].op == "conv_bn_act"
    assert_same(step(model, X.double()), step(stock, X.double()))


def _counts(m, x):
    m.calls += 1
    return F.relu(_z(m, x))


def _collects(m, x):
    m.seen.append(x)
    return F.relu(_z(m, x))


def _draws(m, x):
    return F.relu(_z(m, x)) if random.random() < 2 else x


def _draws_torch(m, x):
    return F.relu(_z(m, x)) if float(torch.rand(())) < 2 else x


def _makes_a_tensor(m, x):
    return F.relu(_z(m, x)) * torch.ones(3, 1, 1)


def _branches_on_values(m, x):
    return F.relu(_z(m, x)) if x.sum() > 0 else x


def _asks_for_the_type(m, x):
    return F.relu(_z(m, x)) if isinstance(x, Tensor) else x


def _asks_torch_for_the_type(m, x):
    return F.relu(_z(m, x)) if torch.is_tensor(x) else x


def _asks_for_gradients(m, x):
    return F.relu(_z(m, x)) if torch.is_grad_enabled() else x


def _reads_an_object(m, x):
    return F.relu(_z(m, x)) if m.settings.residual else x


UNTRACED = [
    (_counts, "sets calls"),
    (_collects, "changes seen"),
    (_draws, "draws random numbers"),
    (_draws_torch, "draws random numbers"),
    (_makes_a_tensor, "makes a tensor"),
    (_branches_on_values, "torch.fx cannot trace"),
    (_asks_for_the_type, "type of its input"),
    (_asks_torch_for_the_type, "type of its input"),
    (_asks_for_gradients, "asks torch.is_grad_enabled"),
    (_reads_an_object, "reads settings"),
]


@pytest.mark.parametrize(("function", "reason"), UNTRACED)
def test_what_cannot_be_traced_stays_and_says_why(function, reason):
    attributes = {"calls": 0, "seen": [], "settings": SimpleNamespace(residual=True)}
    model = nn.ModuleDict({"a": graph(function, **attributes), "b": handwritten()})
    before = (torch.get_rng_state(), random.getstate(), copy.deepcopy(attributes))
    report = accelerate(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert {k: getattr(model["a"], k) for k in attributes} == before[2]
    assert type(model["a"]) is Graph
    (row,) = (r for r in report.left if r.module == "a")
    assert reason in row.reason
    assert {r.module for r in report.fused} == {"b", "b.stem"}


def test_untraceable_forward_around_sequentials():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            if y.isnan().any():
                raise ValueError("NaN")
            return self.fc(y.mean((2, 3)))

    torch.manual_seed(0)
    report = check(randomise(Net()), X)
    assert ops(report) == {"body 0 1": "conv_bn_act"}
    assert "torch.fx cannot trace its forward" in report.left[0].reason


class Views(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def head(self, y: Tensor) -> Tensor:
        if y.isnan().any():
            y = y.nan_to_num()
        return y.view(len(y), -1)


def test_untraceable_forward_that_flattens_by_view_is_refused():
    model = Views(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    with pytest.raises(RuntimeError, match="the model: its forward calls view"):
        accelerate(model)
    assert type(model.body) is nn.Sequential
    report = accelerate(model, strict=False)
    assert not report.fused
    assert model(X).shape == (2, 4 * 10 * 8)


def test_view_in_a_module_without_norms():
    class Flatten(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.size(0), -1)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Flatten())
    check(model, X)
    restore(model)
    assert type(model[3]) is Flatten


def test_defaults_keywords_and_other_arguments():
    class Net(Graph):
        def forward(self, input: Tensor, skip: Tensor | None = None) -> Tensor:
            y = F.relu(self.norm(self.conv(input)))
            return y if skip is None else y + skip

    torch.manual_seed(0)
    model = Net(None).double().eval()
    stock = copy.deepcopy(model)
    assert len(accelerate(model).fused) == 1
    for args, kwargs in (((X64,), {}), ((), {"input": X64}), ((X64, X64), {})):
        torch.testing.assert_close(model(*args, **kwargs), stock(*args, **kwargs))
    with pytest.raises(TypeError, match="inputs"):
        model(inputs=X64)


def test_dict_outputs_keep_their_type():
    def function(m, x):
        return OrderedDict(b=F.relu(_z(m, x)), a=x)

    model = graph(function)
    assert len(accelerate(model).fused) == 1
    y = model(X64)
    assert type(y) is OrderedDict
    assert list(y) == ["b", "a"]


# ---- refusals


def _tied() -> nn.Module:
    model = handwritten()
    model.conv2.weight = model.conv1.weight
    return model


def _same_module_twice() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), conv, nn.BatchNorm2d(3), nn.ReLU())


def _same_norm_in_two_parents() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    halves = [nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU()) for _ in range(2)]
    return nn.Sequential(*halves)


def _hooked() -> nn.Module:
    model = handwritten()
    model.bn1.register_forward_hook(lambda *_: None)
    return model


def _backward_hooked() -> nn.Module:
    model = handwritten()
    model.stem[0].register_full_backward_hook(lambda *_: None)
    return model


def _parametrised() -> nn.Module:
    model = handwritten()
    parametrizations.weight_norm(model.conv4)
    return model


def _old_weight_norm() -> nn.Module:
    model = handwritten()
    model.conv1.register_forward_pre_hook(lambda *_: None)
    return model


REFUSED = {
    "tied": (_tied, r"conv1: its weight is shared: conv1.weight, conv2.weight"),
    "twice": (_same_module_twice, r"0: called in several places: in the forward of the model × 2"),
    "two-parents": (_same_norm_in_two_parents, r"0\.1: called in several places: .*0 × 1.*1 × 1"),
    "hook": (_hooked, r"bn1: a hook on the BatchNorm2d"),
    "backward-hook": (_backward_hooked, r"stem\.0: a hook on the Conv2d"),
    "parametrised": (_parametrised, r"conv4: its parameters are parametrised"),
    "pre-hook": (_old_weight_norm, r"conv1: a hook"),
}


def state(model: nn.Module) -> list:
    """Everything conversion might touch, by identity."""
    return [
        (name, type(m), {k: id(v) for k, v in vars(m).items()}, list(m._modules))
        for name, m in model.named_modules(remove_duplicate=False)
    ]


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_refused_with_names_and_left_alone(case):
    make, message = REFUSED[case]
    torch.manual_seed(0)
    model = make()
    before = state(model)
    with pytest.raises(RuntimeError, match=message) as error:
        accelerate(model)
    assert "strict=False" in str(error.value)
    assert state(model) == before
    report = check(model, X, strict=False)
    name, _, reason = message.replace("\\", "").partition(": ")
    assert any(r.module == name and reason[:20] in r.reason for r in report.left), str(report)
    assert all(name not in f"{r.module}.{c}" for r in report.fused for c in r.children)


def test_a_head_called_on_every_level_is_not_shared():
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).mean((2, 3)) + self.head(x[:, :, ::2, ::2]).mean((2, 3))

    torch.manual_seed(0)
    assert ops(check(randomise(Levels()), X)) == {"head 0 1": "conv_bn_act"}


def test_a_layer_inside_two_modules_is_not_shared():
    layer = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Sequential(layer), nn.Sequential(layer)))
    assert ops(check(model, X)) == {"0.0 0 1": "conv_bn_act"}


def test_an_encoder_whose_parts_another_module_calls_is_not_shared():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Graph(lambda m, x: F.relu(_z(m, x)))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.encoder.norm(self.encoder.conv(x)) + x)

    torch.manual_seed(0)
    report = check(randomise(Encoder()), X)
    assert "Encoder encoder.conv encoder.norm" in ops(report)


class OwnNorm(nn.BatchNorm2d):
    """Whose forward might do anything."""


def test_left_without_an_error():
    """What was never going to be fused is no obstacle."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        OwnNorm(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4),
        nn.GELU(),
    )
    model[5].register_forward_hook(lambda *_: None)
    before = state(model)
    report = accelerate(model)
    assert state(model) == before
    assert not report.fused
    reasons = {r.module: r.reason for r in report.left}
    assert "reflect" in reasons["0"]
    assert "OwnNorm is not a plain" in reasons["3"]
    assert "neither a convolution" in reasons["7"]


# ---- what stays as it was


def test_state_optimizer_and_restore():
    model = handwritten().double()
    stock = copy.deepcopy(model)
    before = state(model)
    kept = dict(model.state_dict(keep_vars=True))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, stock)]
    accelerate(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(kept)
    assert all(after[k] is kept[k] for k in kept)
    assert repr(model) == repr(stock)
    assert isinstance(model, Handwritten)
    for _ in range(2):
        for m, optimizer in zip((model, stock), optimizers, strict=True):
            step(m, X.double())
            optimizer.step()
    stock.load_state_dict(model.state_dict())
    model.load_state_dict(stock.state_dict())
    set_fused(model, False)
    assert restore(model) is model
    for m in model.modules():
        for p in m.parameters(recurse=False):
            p.grad = None
    assert state(model) == before
    assert_same(step(model, X.double()), step(stock, X.double()))
    restore(model)  # of a stock model: nothing


def test_idempotent():
    model = handwritten()
    report = accelerate(model)
    before = state(model)
    model.conv1.register_forward_hook(lambda *_: None)  # layers see to later hooks themselves
    assert accelerate(model) == report
    assert [s[:2] for s in state(model)] == [s[:2] for s in before]


def test_resfast_blocks_in_a_model_are_left():
    projection = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    block = BasicBlock(3, 4, downsample=projection)
    model = nn.Sequential(block, nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    report = accelerate(model)
    assert ops(report) == {"Sequential 1 2": "conv_bn_act"}
    assert type(model[0]) is BasicBlock
    assert type(projection) is nn.Sequential
    restore(model)
    assert type(model[0]) is BasicBlock


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies(way):
    model = handwritten().double()
    accelerate(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert type(other) is type(model)
    assert other.plan() == model.plan()
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    assert_same(step(other, X.double()), step(model, X.double()))
    assert type(restore(other)) is Handwritten


def test_set_fused_and_explain():
    model = handwritten()
    accelerate(model)
    rows = {(r.module, r.children): r.op for r in resfast.explain(model, X).rows}
    assert rows == {
        ("Handwritten", ("conv1", "bn1", "conv2", "bn2")): "residual_block",
        ("Handwritten", ("pre",)): "bn_act",
        ("Handwritten", ("conv4", "bn4")): "conv_bn_act",
        ("stem", ("0", "1")): "conv_bn_act",
    }
    set_fused(model, False)
    rows = resfast.explain(model, X).rows
    assert {r.op for r in rows} == {"unfused"}
    assert {r.reason for r in rows} == {"fusion is switched off (set_fused)"}
    assert not any(r.backends for r in rows)  # no op ran


def test_compile_and_optimize_for_inference():
    model = handwritten().double().eval()
    stock = copy.deepcopy(model)
    accelerate(model)
    x = X.double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), stock(x))
    torch.testing.assert_close(resfast.optimize_for_inference(model)(x), stock(x))
    optimized = resfast.optimize_for_inference(model.float())
    torch.testing.assert_close(optimized(X), stock.float()(X))
    called = [str(n.target) for n in next(iter(optimized.plans.values())).graph.graph.nodes]
    assert not any("batch_norm" in name for name in called)
    model.double().train(), stock.double().train()
    compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert_same({k.replace("_orig_mod.", ""): v for k, v in compiled.items()}, step(stock, x))


def test_fx_trace_and_jit_trace_see_stock_layers():
    model = handwritten().eval()
    accelerate(model)
    graph_module = torch.fx.symbolic_trace(model)
    assert any(n.target == "bn1" for n in graph_module.graph.nodes)
    torch.testing.assert_close(graph_module(X), unfused(model)(X))
    torch.testing.assert_close(torch.jit.trace(model, X)(X), model(X))


# ---- children that change later


def _hook(model: nn.Module) -> None:
    model.bn1.register_forward_hook(lambda m, args, y: y * 2)


def _hook_relu(model: nn.Module) -> None:
    model.act.register_forward_hook(lambda m, args, y: y * 2)


def _hook_sequential(model: nn.Module) -> None:
    model.stem.register_forward_hook(lambda m, args, y: y * 2)


def test_identities_stepped_over_may_become_something_else():
    model = graph(lambda m, x: F.relu(m.skip(_z(m, x))))
    stock = copy.deepcopy(model)
    accelerate(model)
    assert model.plan()[0].op == "conv_bn_act"
    for m in (model, stock):
        m.skip = nn.Tanh()
    assert_same(step(model, X64), step(stock, X64))
    assert "Tanh" in model.plan()[0].reason


def test_max_pool_with_a_hook_is_called():
    model = graph(lambda m, x: m.pool(m.relu(_z(m, x))))
    stock = copy.deepcopy(model)
    accelerate(model)
    assert model.plan() == [(("conv", "norm", "relu", "pool"), "conv_bn_act_max_pool", None)]
    for m in (model, stock):
        m.pool.register_forward_hook(lambda m, args, y: y * 2)
    assert_same(step(model, X64), step(stock, X64))
    assert [row.op for row in model.plan()] == ["conv_bn_act", "unfused"]


def test_a_class_patched_later_runs_its_new_forward(monkeypatch):
    model = graph(lambda m, x: F.relu(_z(m, x)))
    accelerate(model)
    monkeypatch.setattr(Graph, "forward", lambda self, x: x * 3)
    torch.testing.assert_close(model(X64), X64 * 3)


def _sync(model: nn.Module) -> None:
    model.bn2 = nn.SyncBatchNorm(8).double()


def _group_norm(model: nn.Module) -> None:
    model.bn1 = nn.GroupNorm(2, 8).double()


def _other_activation(model: nn.Module) -> None:
    model.act = nn.GELU()


def _parametrise(model: nn.Module) -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 2

    parametrize.register_parametrization(model.conv2, "weight", Double())


CHANGES = {
    f.__name__.strip("_"): (f, unfused_now, rest)
    for f, unfused_now, rest in (
        (_hook, ("conv1", "bn1"), "conv_bn_act"),
        (_hook_relu, (), "residual_block"),
        (_hook_sequential, (), "residual_block"),
        (_group_norm, ("conv1", "bn1"), "conv_bn_act"),
        (_other_activation, (), "residual_block"),
        (_parametrise, ("conv2", "bn2"), "conv_bn_act"),
    )
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_changes_later_runs_itself(change):
    function, layer, rest = CHANGES[change]
    model = handwritten().double()
    stock = copy.deepcopy(model)
    accelerate(model)
    for m in (model, stock):
        function(m)
    assert_same(step(model, X.double()), step(stock, X.double()))
    plan = {row.children: row.op for row in model.plan()}
    assert rest in plan.values()
    assert {children for children, op in plan.items() if op == "unfused"} == (
        {layer} if layer else set()
    )


def test_sync_batch_norm_without_peers_fuses():
    """Put in later, or there from the start; alone, without a rank of its input, it is called."""
    model, fresh = handwritten(), handwritten()
    accelerate(model)
    for m in (model, fresh):
        _sync(m)
    accelerate(fresh)
    for m in (model, fresh):
        assert m.plan()[0] == (("conv1", "bn1", "conv2", "bn2"), "residual_block", None)
    alone = nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4), nn.ReLU())
    assert not accelerate(alone).fused


def test_hook_on_the_relu_of_a_block():
    torch.manual_seed(0)
    model = randomise(Shortcuts(SHORTCUTS["projection"](), False)).double()
    stock = copy.deepcopy(model)
    accelerate(model)
    for m in (model, stock):
        m.relu.register_forward_hook(lambda m, args, y: y * 2)
    x = images(2, 3, 7, 6, dtype=torch.float64)
    assert_same(step(model, x), step(stock, x))
    rows = model.plan()
    assert [row.op for row in rows] == ["conv_bn_act"] * 3
    assert all("a hook on the ReLU" in row.reason for row in rows)


def test_hook_on_a_sequential_that_was_traced_into():
    torch.manual_seed(0)
    model = randomise(Shortcuts(SHORTCUTS["projection"](), False)).double()
    stock = copy.deepcopy(model)
    accelerate(model)
    for m in (model, stock):
        m.shortcut.register_forward_hook(lambda m, args, y: y * 2)
    x = images(2, 3, 7, 6, dtype=torch.float64)
    assert_same(step(model, x), step(stock, x))
    assert "hook on the Sequential" in model.plan()[0].reason


# ---- types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_returns_the_types_stock_returns(dtype):
    """A float32 shortcut added to 16-bit layers promotes, which the fused addition would not."""

    def promotes(m, x):
        return F.relu(_z(m, x) + x), F.relu(_z2(m, x))

    def _z2(m, x):
        return m.norm(m.conv(x))

    torch.manual_seed(0)
    model = Graph(lambda m, x: F.relu(_z(m, x) + x)).eval()
    plain = Graph(lambda m, x: F.relu(_z(m, x))).eval()
    for m in (model, plain):
        stock = copy.deepcopy(m)
        accelerate(m)
        with torch.autocast("cpu", dtype):
            got, want = m(X), stock(X)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
