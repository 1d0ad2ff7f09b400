"""Each op at every stage's shape of ResNet-18 and -50 against stock ops; below 1 resfast wins."""

from __future__ import annotations

from ratios import in_ratios, tell

from resfast.benchmark import stages
from resfast.benchmark.timing import race, timer_for
from resfast.benchmark.work import errors, excess

BATCH = {"cpu": 4, "cuda": 64}
# compiling 41 ops in three modes takes longer than all the timing
DEFAULT_PEERS = ("eager-nhwc",)
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16", "float32")}


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    device = option("--device").split(":")[0]
    peers = {"default": DEFAULT_PEERS, "all": tuple(stages.PEERS)}.get(option("--peers"))
    if peers is None:
        peers = [p for p in option("--peers").split(",") if p in stages.PEERS]
    dtypes = option("--dtypes").split(",") if option("--dtypes") else DEFAULT_DTYPES[device]
    works = [
        stages.OpWork(case, mode, dtype, option("--device"))
        for dtype in dtypes
        for mode in stages.MODES
        for case in stages.stage_cases(BATCH[device], training=mode != "infer")
        # bf16 on CPU: the training step only, to keep the default run short
        if not (device == "cpu" and dtype != "float32" and mode != "step")
    ]
    metafunc.parametrize("work", works, ids=str)
    metafunc.parametrize("peer", peers)


@in_ratios("ops")
def test_op(benchmark, work, peer, device, budget, ceilings):
    reference = work.reference()
    limits = work.limits(reference)
    contenders, found = {}, {}
    for name, how in (("resfast", stages.OURS), (peer, stages.PEERS[peer])):
        contenders[name] = work.contender(*how)
        found[name] = errors(contenders[name].results(), reference)
        assert excess(found[name], limits) is None, name
    steps = {name: c.step for name, c in contenders.items()}
    result = race(steps, budget=budget, timer=timer_for(device))
    pairs = zip(result.seconds["resfast"], result.seconds[peer], strict=True)
    limit = ceilings(work.dtype)
    floor = {} if limit is None else {"floor_ms": 1e3 * limit.seconds(work.costs())}
    tell(
        benchmark,
        [ours / other for ours, other in pairs],
        resfast_ms=1e3 * result.median("resfast"),
        peer_ms=1e3 * result.median(peer),
        faster_by=result.ratio("resfast", peer).verdict(),
        relative_errors={name: e._asdict() for name, e in found.items()},
        **floor,
    )
