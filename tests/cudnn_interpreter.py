"""The part of nvidia-cudnn-frontend that resfast draws with, run on CPU tensors in float32.

It stands in for the package where there is no GPU: what a graph computes, by cuDNN's definitions,
rounded to a tensor's type where that has one, and what a graph requires of its operands.
"""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

data_type = SimpleNamespace(FLOAT="float", HALF="half", BFLOAT16="bfloat16", BOOLEAN="boolean")
heur_mode = SimpleNamespace(A="a", FALLBACK="fallback")
_STORED = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


def backend_version():
    return 91900


class _Tensor:
    """An operand, where ``made`` is None, or what ``made`` computes."""

    def __init__(self, dim, made=None, data_type=None, by_value=False, stride=None):
        self.dim, self.made, self.data_type, self.by_value = list(dim), made, data_type, by_value
        self.stride, self.output = stride, False

    def set_output(self, output):
        self.output = output
        return self

    def set_data_type(self, data_type):
        self.data_type = data_type
        return self


class pygraph:
    planned = 0

    def __init__(self, *, io_data_type, intermediate_data_type, compute_data_type, handle=None):
        assert (intermediate_data_type, compute_data_type) == ("float", "float")
        self.tensors = []
        self.stage = 0

    def _made(self, f, *inputs, dim=None):
        dims = [t.dim for t in inputs]
        dim = dim or max(dims, key=math.prod)
        self.tensors.append(_Tensor(dim, lambda value: f(*map(value, inputs))))
        return self.tensors[-1]

    def _several(self, f, dims, *inputs):
        def all_of(value):
            if f not in value.values:
                value.values[f] = f(*map(value, inputs))
            return value.values[f]

        made = [_Tensor(dim, lambda v, i=i: all_of(v)[i]) for i, dim in enumerate(dims)]
        self.tensors += made
        return made

    def tensor(self, *, name, dim, stride, data_type, is_pass_by_value):
        self.tensors.append(_Tensor(dim, None, data_type, is_pass_by_value, stride))
        return self.tensors[-1]

    # ---- operations

    def add(self, *, a, b):
        return self._made(torch.add, a, b)

    def sub(self, *, a, b):
        return self._made(torch.sub, a, b)

    def scale(self, *, input, scale):
        return self._made(torch.mul, input, scale)

    def bias(self, *, input, bias):
        return self._made(torch.add, input, bias)

    def relu(self, *, input):
        return self._made(F.relu, input)

    def relu_backward(self, *, loss, input):
        return self._made(lambda dy, x: torch.where(x > 0, dy, 0), loss, input)

    def cmp_gt(self, *, input, comparison):
        return self._made(torch.gt, input, comparison)

    def batchnorm_inference(self, *, input, mean, inv_variance, scale, bias):
        return self._made(
            lambda x, m, r, s, b: (x - m) * r * s + b, input, mean, inv_variance, scale, bias
        )

    def batchnorm(
        self, *, name, input, scale, bias, in_running_mean, in_running_var, epsilon, momentum
    ):
        def forward(x, s, b, old_mean, old_var, eps, new):
            count = x.numel() // x.shape[1]
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            rstd = (var + eps).rsqrt()
            unbiased = var * (count / (count - 1))
            return (
                (x - mean) * rstd * s + b,
                mean,
                rstd,
                (1 - new) * old_mean + new * mean,
                (1 - new) * old_var + new * unbiased,
            )

        inputs = (input, scale, bias, in_running_mean, in_running_var, epsilon, momentum)
        return self._several(forward, [input.dim, *[scale.dim] * 4], *inputs)

    def batchnorm_backward(self, *, name, grad, input, scale, mean, inv_variance):
        def backward(dy, x, s, m, r):
            count = x.numel() // x.shape[1]
            xhat = (x - m) * r
            dscale, dbias = (t.sum((0, 2, 3), keepdim=True) for t in (dy * xhat, dy))
            return s * r * (dy - dbias / count - xhat * dscale / count), dscale, dbias

        inputs = (grad, input, scale, mean, inv_variance)
        return self._several(backward, [input.dim, scale.dim, scale.dim], *inputs)

    # ---- planning, in this order

    def _next(self, stage):
        assert self.stage == stage - 1, "planned in another order"
        self.stage = stage

    def validate(self):
        self._next(1)

    def build_operation_graph(self):
        self._next(2)

    def create_execution_plans(self, modes):
        assert modes == ["a", "fallback"]
        self._next(3)

    def check_support(self):
        self._next(4)

    def build_plans(self):
        self._next(5)
        pygraph.planned += 1

    def get_workspace_size(self):
        assert self.stage == 5
        return 24

    # ---- execution

    def execute(self, pack, workspace, handle):
        assert workspace.dtype == torch.uint8
        assert workspace.numel() == 24
        inputs = [t for t in self.tensors if t.made is None]
        outputs = [t for t in self.tensors if t.output]
        assert set(pack) == {*inputs, *outputs}, "operands missing or unknown"
        for t, given in pack.items():
            _check(t, given)
        taken = {pack[t].data_ptr() for t in inputs}
        for t in outputs:
            assert pack[t].data_ptr() not in taken, "a result over an operand"
            taken.add(pack[t].data_ptr())
        value = _Values({t: _read(t, pack[t]) for t in inputs})
        for t, result in [(t, value(t)) for t in outputs]:
            _write(t, pack[t], result)


class _Values:
    def __init__(self, values):
        self.values = values

    def __call__(self, t):
        if t not in self.values:
            v = t.made(self)
            stored = _STORED.get(t.data_type)
            self.values[t] = v if stored is None else v.to(stored).float()
        return self.values[t]


def _check(t, given):
    if t.data_type == "boolean":
        n, c, h, w = t.dim
        assert given.dtype == torch.uint8
        assert given.shape == (n * h * w, c // 8)
        assert given.is_contiguous()
        return
    assert given.dtype == _STORED[t.data_type]
    if t.by_value:
        assert given.numel() == 1
        return
    assert given.data_ptr() % 16 == 0
    if given.dim() == 1:
        assert [1, given.numel(), 1, 1] == t.dim
        assert given.is_contiguous()
        return
    assert list(given.shape) == t.dim
    _, c, h, w = t.dim
    assert given.stride() == (h * w * c, 1, w * c, c)


def _read(t, given):
    if t.data_type == "boolean":
        n, c, h, w = t.dim
        bits = given.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8) & 1
        return bits.view(n, h, w, c).permute(0, 3, 1, 2).float()
    return given.float().view(t.dim) if given.dim() == 1 else given.float()


def _write(t, given, result):
    if t.data_type == "boolean":
        n, c, h, w = t.dim
        bits = result.permute(0, 2, 3, 1).reshape(n * h * w, c // 8, 8).to(torch.uint8)
        given.copy_((bits << torch.arange(8, dtype=torch.uint8)).sum(2))
    else:
        given.copy_(result.view(given.shape))


def install(monkeypatch):
    """In place of the package, for CPU tensors."""
    from resfast.backends import cudnn, cudnn_graphs

    @contextlib.contextmanager
    def handle(device):
        yield None

    monkeypatch.setattr(cudnn_graphs, "_cudnn", lambda: SimpleNamespace(**globals()))
    monkeypatch.setattr(cudnn_graphs, "_handle", handle)
    monkeypatch.setattr(cudnn_graphs, "_plans", {})
    monkeypatch.setattr(cudnn_graphs, "unsupported", lambda index, dtype: None)
    monkeypatch.setattr(cudnn, "DEVICE", "cpu")
    monkeypatch.setattr(cudnn.CudnnBackend, "unavailable_reason", lambda self: None)
