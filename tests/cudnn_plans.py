"""Asks cuDNN itself, without a GPU, what it has engines for; prints one JSON object.

cuDNN plans and compiles for a device that only its properties describe. Its runtime-compiled
engines load the driver's library all the same, so there has to be one that exports the driver's
functions: tests/test_cudnn_graphs.py makes it.
"""

from __future__ import annotations

import json
import sys

import torch  # first, as resfast does: it loads the NVRTC that cuDNN compiles with

from resfast.backends import cudnn_graphs as graphs

# the properties as cuDNN writes them, of NVIDIA A100-SXM4-80GB and H100 SXM5 80GB
_COMMON = {
    "warpSize": 32,
    "maxSharedMemoryPerBlock": 49152,
    "reservedSharedMemoryPerBlock": 1024,
    "maxRegistersPerSM": 65536,
    "regsPerBlock": 65536,
    "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "totalGlobalMem": 80 * 2**30,
    "maxBlockSize": [1024, 1024, 64],
    "maxGridSize": [2**31 - 1, 65535, 65535],
    "supportCoopLaunch": 1,
    "pciDeviceId": 0,
    "isTccDriver": 0,
    "cudaDeviceId": 0,
    "driverVer": 13000,
}
DEVICES = {
    80: {
        "deviceVer": 800,
        "deviceName": "NVIDIA A100-SXM4-80GB",
        "multiProcessorCount": 108,
        "maxSharedMemoryPerBlockOptin": 166912,
        "l2CacheSize": 40 * 2**20,
        "smClockRateKHz": 1410000,
        "memClockRateKHz": 1593000,
    },
    90: {
        "deviceVer": 900,
        "deviceName": "NVIDIA H100 80GB HBM3",
        "multiProcessorCount": 132,
        "maxSharedMemoryPerBlockOptin": 232448,
        "l2CacheSize": 50 * 2**20,
        "smClockRateKHz": 1980000,
        "memClockRateKHz": 2619000,
    },
}
# ResNet-50's norms at 224², as (channels, side)
RESNET50 = (
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14)),
    *((1024, 14), (512, 14), (512, 7), (2048, 7)),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCH = 256


def norm_graphs(shape, dtype):
    """Every graph that the backend runs."""
    both = (False, True)
    return [
        *(
            graphs.NormForward(shape, dtype, residual, True, mask)
            for residual in both
            for mask in both
        ),
        graphs.NormForward(shape, dtype, False, False, False),
        graphs.NormBackward(shape, dtype, None),
        *(
            graphs.NormBackward(shape, dtype, relu, second, store)
            for relu in ("mask", "again")
            for second in both
            for store in both
        ),
        *(
            graphs.NormApply(shape, dtype, residual, affine, relu, after, mask)
            for residual, affine, after in (
                *((False, False, False), (True, False, False)),
                *((True, True, False), (True, False, True)),
            )
            for relu, mask in ((False, False), (True, False), (True, True))
        ),
        *(
            graphs.NormBackwardApply(shape, dtype, relu, training, training, store)
            for relu in (None, "y", "again")
            for training in both
            for store in (both if relu else (False,))
        ),
    ]


def attempt(ask, *arguments, **options):
    """What went wrong, or None."""
    try:
        ask(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:2000]
    return None


class _Convolution:
    """A convolution of the input through ReLU(scale·x + beta) [− mean first], with GenStats."""

    shape = (64, 64, 56, 56)

    def __init__(self, dtype, affine, centred=False):
        self.dtype, self.affine, self.centred = dtype, affine, centred

    def draw(self, d):
        g, x = d.graph, d.activation("x")
        if self.affine is not None:
            types = {torch.float32: d.float, self.dtype: d.stored}
            mean, scale, beta = (
                d.operand(name, (1, 64, 1, 1), types[self.affine]) for name in "msb"
            )
            if self.centred:
                x = g.sub(a=x, b=mean)
            x = g.relu(input=g.bias(input=g.scale(input=x, scale=scale), bias=beta))
        weight = d.operand("w", (64, 64, 3, 3), d.stored)
        z = g.conv_fprop(image=x, weight=weight, padding=[1, 1], stride=[1, 1], dilation=[1, 1])
        d.output("z", z, d.stored)
        for name, v in zip(("sum", "squares"), g.genstats(input=z), strict=True):
            d.output(name, v, d.float)


def main(architecture: int) -> dict:
    cudnn = graphs._cudnn()
    properties = cudnn.create_device_properties(json.dumps(_COMMON | DEVICES[architecture]))
    device = {"device_property": properties, "sm_version": architecture}
    asked, refused = 0, {}
    for i, (c, side) in enumerate(RESNET50):
        for graph in norm_graphs((BATCH, c, side, side), DTYPES[i % 3]):
            asked += 1
            if reason := attempt(graphs.engines, graph, **device):
                refused[str(graph)] = reason
    compiled = {
        str(graph): attempt(graphs.plan, graph, **device)
        for graph in (
            graphs.NormForward((BATCH, 256, 56, 56), torch.bfloat16, True, True, True),
            graphs.NormBackward((BATCH, 256, 56, 56), torch.bfloat16, "mask", True, True),
            graphs.NormBackward((BATCH, 64, 56, 56), torch.float16, "again", False, True),
            graphs.NormApply((BATCH, 64, 56, 56), torch.float32, True, True, True, False, True),
            graphs.NormBackwardApply(
                (BATCH, 64, 56, 56), torch.bfloat16, "again", True, True, False
            ),
        )
    }
    edges = {
        f"{shape} {str(dtype).removeprefix('torch.')}": attempt(
            graphs.engines, graphs.NormForward(shape, dtype, True, True, False), **device
        )
        is None
        for shape in ((2, 4, 5, 7), (2, 8, 5, 7), (2, 12, 5, 7), (2, 6, 5, 7))
        for dtype in DTYPES
    }
    edges |= {
        f"{n}·2^21 values": attempt(
            graphs.engines,
            graphs.NormForward((n, 128, 128, 128), torch.float16, True, True, True),
            **device,
        )
        is None
        for n in (1024, 1025)
    }
    half, single = torch.float16, torch.float32
    convolutions = {
        name: attempt(graphs.engines, _Convolution(*arguments), **device) is None
        for name, arguments in {
            "fp16, statistics": (half, None),
            "fp16, fp16 affine": (half, half),
            "fp16, fp32 affine": (half, single),
            "fp16, centred": (half, half, True),
            "bf16, statistics": (torch.bfloat16, None),
        }.items()
    }
    return {
        "asked": asked,
        "refused": refused,
        "compiled": compiled,
        "edges": edges,
        "convolutions": convolutions,
        "dbn_weight": hasattr(cudnn.pygraph, "dbn_weight"),
        "version": cudnn.backend_version_string(),
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
