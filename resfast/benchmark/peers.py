"""What people would run instead of resfast, each with the reason why it cannot run here."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
import itertools
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

import resfast
from resfast.benchmark import apex
from resfast.benchmark.work import JUDGED_IMAGES, Batch, Contender, Results, Work, in_format
from resfast.diagnostics.numerics import DTYPES

OURS = "resfast"


def forget_compiled() -> None:
    """Before each race: torch.compile keeps few variants of a function, then goes on uncompiled."""
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True


@dataclass(frozen=True)
class Peer:
    """`build(work, model)` makes the contender from resfast's model, whose weights it shares.

    `why_not(work)` is the reason why it cannot run, or None. `spins`: its worker threads stay
    busy for a while after a call. `default`: measured unless peers are named.
    """

    name: str
    title: str
    build: Callable[[Work, nn.Module], Contender]
    why_not: Callable[[Work], str | None] = lambda work: None
    spins: bool = False
    default: bool = False


def missing(*modules: str) -> str | None:
    absent = [m for m in modules if importlib.util.find_spec(m) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def _stock(model: nn.Module, memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
    return in_format(resfast.unfused(model), memory_format)


def _ours(work: Work, model: nn.Module) -> Contender:
    return work.contender(model, model, work.batches())


def _memory_efficient(work: Work, model: nn.Module) -> Contender:
    other = work.build(memory_efficient=True)
    return work.contender(other, other, work.batches())


def _optimized(work: Work, model: nn.Module) -> Contender:
    other = resfast.optimize_for_inference(model)
    return work.contender(other, other, work.batches())


def _eager_nchw(work: Work, model: nn.Module) -> Contender:
    stock = _stock(model, torch.contiguous_format)
    return work.contender(stock, stock, work.batches(torch.contiguous_format))


def _eager_nhwc(work: Work, model: nn.Module) -> Contender:
    stock = _stock(model)
    return work.contender(stock, stock, work.batches())


def _compiled(**settings: Any) -> Callable[[Work, nn.Module], Contender]:
    """torch.compile under Inductor `settings`.

    They are passed as options too: with equal options a second compiled module of the same class
    runs the code of the first. It compiles here, since Dynamo reads `freezing` globally.
    """

    def build(work: Work, model: nn.Module) -> Contender:
        stock = _stock(model)
        contender = work.contender(
            torch.compile(stock, options=settings or None), stock, work.batches()
        )
        with inductor.patch(**settings), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contender.step()
        return contender

    return build


def _autotuned(work: Work, model: nn.Module) -> Contender:
    settings: dict[str, Any] = {"max_autotune": True, "coordinate_descent_tuning": True}
    if work.device.startswith("cuda"):
        settings["triton.cudagraphs"] = True
    build = _compiled if work.training else functools.partial(_compiled, freezing=True)
    return build(**settings)(work, model)


def _cuda_graph(work: Work, model: nn.Module) -> Contender:
    """Stock layers, channels_last, captured once and replayed; each input is copied into place."""
    stock = _stock(model)
    batches = work.batches()
    static = (batches[0][0].clone(), batches[0][1].clone())
    eager = work.contender(stock, stock, [static])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output: Any = eager.step()
    turn = itertools.cycle(batches)

    def replay(batch: Batch | None = None) -> Any:
        for kept, new in zip(static, batch or next(turn), strict=True):
            kept.copy_(new)
        graph.replay()
        return output

    def results() -> Results:
        replay(batches[0])
        if not work.training:
            return Results(output[:JUDGED_IMAGES], [])
        gradients = [p.grad.clone() for p in stock.parameters() if p.grad is not None]
        return Results(output.clone(), gradients)

    return Contender(replay, results, stock)


def _cudnn_fused(work: Work, model: nn.Module) -> Contender:
    """BatchNorm folded, then cudnn_convolution_relu and cudnn_convolution_add_relu: what frozen
    TorchScript rewrites convolution, addition and ReLU to on CUDA.
    """
    stock = _stock(model)
    batches = work.batches()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(stock, batches[0][0])
        frozen = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
    return work.contender(frozen, stock, batches)


def _cudnn_norms(work: Work, model: nn.Module) -> Contender:
    """resfast's schedule on cuDNN's own fusions of norm, addition and ReLU."""
    contender = work.contender(model, model, work.batches())
    forced = resfast.backend("cudnn")
    return dataclasses.replace(
        contender, step=forced(contender.step), results=forced(contender.results)
    )


def _apex(work: Work, model: nn.Module) -> Contender:
    other = apex.replace_blocks(_stock(model))
    return work.contender(other, other, work.batches())


def _onnxruntime(work: Work, model: nn.Module) -> Contender:
    import onnxruntime

    stock = _stock(model, torch.contiguous_format)
    batches = work.batches(torch.contiguous_format)
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            stock,
            (batches[0][0],),
            file,  # type: ignore[arg-type]
            input_names=["x"],
            output_names=["y"],
            dynamo=False,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return work.contender(run, stock, batches)


def _openvino(work: Work, model: nn.Module) -> Contender:
    import openvino

    stock = _stock(model, torch.contiguous_format)
    batches = work.batches(torch.contiguous_format)
    example = batches[0][0]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(stock, example_input=example)
    converted.reshape(list(example.shape))
    # without the hint, float32 networks run in bfloat16 where the processor has it
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[work.dtype]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.compile_model(converted, "CPU", settings)

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(compiled(x.numpy(), share_inputs=True, share_outputs=True)[0])

    return work.contender(run, stock, batches)


def _inference_only(work: Work) -> str | None:
    return "for inference" if work.training else None


def _cpu_engine(*modules: str) -> Callable[[Work], str | None]:
    def why_not(work: Work) -> str | None:
        if work.device != "cpu":
            return "measured on CPU"
        if work.dtype != "float32":
            return "measured in float32"
        return _inference_only(work) or missing(*modules)

    return why_not


def _cuda_only(work: Work) -> str | None:
    return None if work.device.startswith("cuda") else "needs CUDA"


def _compiler_reason(work: Work) -> str | None:
    if work.device.startswith("cuda"):
        return missing("triton")
    return None if shutil.which("g++") or shutil.which("clang++") else "needs a C++ compiler"


def _cudnn_norms_reason(work: Work) -> str | None:
    if not work.training:
        return "for training"
    backends = resfast.backends.available(work.device, DTYPES[work.dtype])
    return next(reason for name, _, reason in backends if name == "cudnn") or None


def _apex_reason(work: Work) -> str | None:
    if not work.training or work.dtype != "float16":
        return "trains in float16"
    return _cuda_only(work) or apex.why_not()


def _bottleneck_models(work: Work) -> str | None:
    return None if work.model == "resnet50" else "ResNet-50 only: the memory/time trade of README"


PEERS = {
    peer.name: peer
    for peer in (
        Peer(OURS, "resfast", _ours),
        Peer(
            "memory-efficient",
            "resfast, memory_efficient=True",
            _memory_efficient,
            lambda work: _bottleneck_models(work) if work.training else "trains only",
        ),
        Peer(
            "optimized",
            "resfast, optimize_for_inference",
            _optimized,
            _inference_only,
            default=True,
        ),
        Peer("eager-nchw", "eager", _eager_nchw),
        Peer("eager-nhwc", "eager, channels_last", _eager_nhwc, default=True),
        Peer(
            "compile",
            "torch.compile",
            _compiled(),
            _compiler_reason,
            default=True,
        ),
        Peer(
            "compile-freezing",
            "torch.compile, freezing",
            _compiled(freezing=True),
            lambda work: _inference_only(work) or _compiler_reason(work),
            default=True,
        ),
        Peer("compile-autotune", "torch.compile, max-autotune", _autotuned, _compiler_reason),
        Peer(
            "onnxruntime",
            "ONNX Runtime",
            _onnxruntime,
            _cpu_engine("onnxruntime", "onnx"),
            spins=True,
            default=True,
        ),
        Peer("openvino", "OpenVINO", _openvino, _cpu_engine("openvino"), spins=True, default=True),
        Peer("cuda-graph", "eager in a CUDA graph", _cuda_graph, _cuda_only),
        Peer(
            "cudnn-fused",
            "cuDNN convolution+add+ReLU",
            _cudnn_fused,
            lambda work: _inference_only(work) or _cuda_only(work),
        ),
        Peer("cudnn-norms", "cuDNN norm+add+ReLU", _cudnn_norms, _cudnn_norms_reason),
        Peer("apex", "apex group BN", _apex, _apex_reason),
    )
}
