"""The schedule of a batch norm over the backends' functions, forward and backward.

Ioffe and Szegedy 2015 (arXiv:1502.03167). Not ops themselves: every op with a norm in it calls
these below its own boundary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resfast.backends import norm_race
from resfast.backends.interface import Affine, acc_dtype, empty_nhwc
from resfast.backends.select import find, report, select
from resfast.ops import collectives


class Statistics(NamedTuple):
    """What a norm divides by: mean and biased variance per channel, accumulation dtype."""

    mean: Tensor
    var: Tensor


class Norm(NamedTuple):
    """A norm made ready: the affine to apply, and what its backward needs."""

    affine: Affine
    rstd: Tensor


def count(z: Tensor) -> int:
    """Values per channel."""
    return z.shape[0] * z.shape[2] * z.shape[3]


def statistics(
    z: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool
) -> Statistics:
    """The batch's statistics in training, else copies of the running ones."""
    if training:
        mean, m2 = select("norm_stats", z).norm_stats(z)
        return Statistics(mean, m2.div_(max(1, count(z))))
    assert running_mean is not None
    assert running_var is not None
    acc = acc_dtype(z.dtype)
    # copies: an op's output may not alias its input
    return Statistics(running_mean.to(acc, copy=True), running_var.to(acc, copy=True))


class Ranks(NamedTuple):
    """The process group a norm is synchronised over, and its values per channel, fp64 ``[1]``."""

    group: str
    total: Tensor


def synchronised(
    z: Tensor, group: str, local: Statistics | None = None
) -> tuple[Statistics, Ranks]:
    """The statistics of all ranks' z; ``local``, exact ones of this rank's, if known already.

    Chan's rule for any number of parts: var = Σ n_r·(var_r + (mean_r − mean)²) / Σ n_r, in fp64. A
    rank's mean is not rounded before, for that would count where the ranks' means differ.
    """
    n = count(z)
    if local is None:
        mean, m2 = select("norm_stats", z).norm_stats_exact(z)
        local = Statistics(mean, m2.div_(max(1, n)))
    if n == 0:
        local = Statistics(*(torch.zeros_like(v) for v in local))
    own = torch.cat([*local, local.mean.new_full((1,), n, dtype=torch.float64)])
    rows = collectives.gathered(own, group)
    counts = rows[:, -1]
    total = counts.sum(0, keepdim=True)
    if n <= 1 and float(total) == 1:  # no rank has more, so all of them look and raise
        raise ValueError("Expected more than 1 value per channel when training, on all ranks")
    shares = counts / total.clamp(min=1)
    means, variances = rows[:, :-1].chunk(2, 1)
    # relative to a rank that has values: equal means come out exactly
    pilot = means.index_select(0, counts.argmax(0, keepdim=True)).squeeze(0)
    mean = pilot + shares @ (means - pilot)
    var = shares @ (variances + (means - mean).square())
    acc = acc_dtype(z.dtype)
    return Statistics(mean.to(acc), var.to(acc)), Ranks(group, total)


def fake_statistics(z: Tensor) -> Statistics:
    """Fakes of what ``statistics`` returns."""
    v = z.new_empty(z.shape[1], dtype=acc_dtype(z.dtype))
    return Statistics(v, torch.empty_like(v))


def prepare(stats: Statistics, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Norm:
    """scale = gamma·rstd, rstd = 1/√(var + eps)."""
    backend, _ = find("norm_apply", stats.mean)
    return Norm(*backend.norm_prepare(stats.mean, stats.var, gamma, beta, eps))


def apply(
    z: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    relu: bool = True,
    add_after_act: bool = False,
    out: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """act(norm(z) + r) or act(norm(z)) + r; ``mask`` receives the output's bit mask."""
    residual_affine = residual_norm.affine if residual_norm else None
    return select("norm_apply", z).norm_apply(
        z, norm.affine, residual, residual_affine, relu, add_after_act, out, mask
    )


def forward(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    add_after_act: bool,
    stats: Statistics | None = None,
) -> tuple[Tensor, Statistics]:
    """act(norm(z) + r) or act(norm(z)) + r, and the statistics, where they are not known yet."""
    if stats is None and training:
        once = forward_once(z, gamma, beta, eps, residual, None, relu, add_after_act)
        if once is not None:
            return once
    if stats is None:
        stats = statistics(z, running_mean, running_var, training)
    norm = prepare(stats, gamma, beta, eps)
    return apply(z, norm, residual, None, relu, add_after_act), stats


def forward_once(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    relu: bool = True,
    add_after_act: bool = False,
) -> tuple[Tensor, Statistics] | None:
    """``forward`` by the batch's statistics in one read of z, or None where that does not fit."""
    form = norm_race.forward_form(residual, mask, relu, add_after_act)
    backend, declined = find("norm_apply", z, saved=form)
    if not backend.reads_once(z):
        return None
    report("norm_apply", backend, z, declined, ("norm_stats",))
    y, mean, var = backend.norm_forward(z, gamma, beta, eps, residual, relu, add_after_act, mask)
    return y, Statistics(mean, var)


class NormGradients(NamedTuple):
    """dz, and dgamma and dbeta ``[C]``."""

    dz: Tensor
    dgamma: Tensor
    dbeta: Tensor


def coefficients(
    norm: Norm, sum_du: Tensor, sum_du_xhat: Tensor, n: int | Tensor, training: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dz = scale·(du − Σdu/n − x̂·Σ(du·x̂)/n) in terms of z − mean and 1; eval: dz = scale·du."""
    if not training:
        return None, None
    scale = norm.affine.scale / (n.clamp(min=1) if isinstance(n, Tensor) else max(1, n))
    return -(scale * norm.rstd * sum_du_xhat), -(scale * sum_du)


def backward(
    dy: Tensor,
    z: Tensor,
    norm: Norm,
    *,
    y: Tensor | None,
    relu: bool,
    training: bool,
    dz: Tensor | None = None,
    du: Tensor | None = None,
    activation: Tensor | None = None,
    ranks: Ranks | None = None,
) -> NormGradients:
    """Backward of act(norm(z)[+ r]); with ``ranks``, of a norm synchronised over them.

    ``y`` is the saved output, needed where the ReLU's mask cannot be read off norm(z) alone:
    a residual joined before the activation. Written where given: ``dz`` (else, or in one read, a
    new tensor; dy itself will do if the caller owns it), ``du``, the residual's gradient, and
    ``activation``.
    """
    if training and ranks is None:
        once = backward_once(dy, z, norm, y, relu, activation=activation, du=du)
        if once is not None:
            return once
    sum_du, sum_du_xhat = select("norm_backward_reduce", z).norm_backward_reduce(
        dy, z, norm.affine, norm.rstd, y, relu, activation
    )
    if ranks is None:
        coef_z, coef_1 = coefficients(norm, sum_du, sum_du_xhat, count(z), training)
    else:  # dz depends on all ranks' values; dgamma and dbeta stay this rank's own
        own = torch.cat([sum_du, sum_du_xhat]).double()
        all_du, all_du_xhat = collectives.summed(own, ranks.group).to(sum_du.dtype).chunk(2)
        n = ranks.total.to(sum_du.dtype)
        coef_z, coef_1 = coefficients(norm, all_du, all_du_xhat, n, training)
    dz = empty_nhwc(z.shape, z) if dz is None else dz
    select("norm_backward_apply", z).norm_backward_apply(
        dy, z, norm.affine, y, relu, coef_z, coef_1, dz, du
    )
    return NormGradients(dz, sum_du_xhat, sum_du)


def backward_once(
    dy: Tensor,
    z: Tensor,
    norm: Norm,
    y: Tensor | None,
    relu: bool,
    *,
    activation: Tensor | None = None,
    du: Tensor | None = None,
    dy2: Tensor | None = None,
    mask: Tensor | None = None,
) -> NormGradients | None:
    """``backward`` in training of dy + dy2 in one read of z, or None where that does not fit."""
    form = norm_race.backward_form(y, mask, relu, du)
    backend, declined = find("norm_backward_apply", z, saved=form)
    if not backend.reads_once(z):
        return None
    report("norm_backward_apply", backend, z, declined, ("norm_backward_reduce",))
    dz, sum_du, sum_du_xhat = backend.norm_backward(
        dy, z, norm.affine, norm.rstd, y, relu, activation, du, dy2, mask
    )
    return NormGradients(dz, sum_du_xhat, sum_du)
