"""Sound as images of one channel: wav files → log-mel spectrograms."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import torch
from torch import Tensor

from resfast.training.config import UserError

SECONDS = 1.0  # of a clip that are looked at: cut, or filled up with silence
SIDE = 40  # mel bands and frames, unless another size is asked for
RANGE_DB = 80.0  # below the loudest cell all is silence
LOWEST_HZ, HIGHEST_HZ = 20.0, 4000.0  # of the mel bands, whatever the rate


def read_wav(path: Path) -> tuple[Tensor, int]:
    """(float32 samples in [-1, 1], their mean over the channels; samples a second).

    Raises:
        UserError: no wav file of 8, 16, 24 or 32 bit PCM.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, rate = file.getsampwidth(), file.getframerate()
            channels = file.getnchannels()
            data = file.readframes(file.getnframes())
    except FileNotFoundError:
        raise UserError(f"no sound at {path}") from None
    except (OSError, EOFError, wave.Error) as error:
        raise UserError(f"cannot read sound {path}: {str(error) or 'it ends too early'}") from None
    if len(data) % (width * channels) or not data:
        raise UserError(f"cannot read sound {path}: {len(data)} bytes are not whole samples")
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, width).int()
    if width == 1:
        values = flat[:, 0] - 128  # unsigned, unlike all others
    else:
        values = torch.zeros(len(flat), dtype=torch.int32)
        for byte in range(width):
            values |= flat[:, byte] << (8 * (byte + 4 - width))
        values >>= 8 * (4 - width)
    samples = values.double() / 2 ** (8 * width - 1)
    return samples.view(-1, channels).mean(1).float(), rate


def log_mel(samples: Tensor, rate: int, bands: int, frames: int) -> Tensor:
    """``[1, bands, frames]`` float32 in [0, 1]: power in mel bands in dB, 1 the loudest cell.

    The first ``SECONDS`` of ``samples``; Hann windows of two frames' length; triangular bands even
    on the mel scale m = 2595·log10(1 + f/700) from 20 to 4000 Hz (O'Shaughnessy 1987, Speech
    Communication). Cells 80 dB below the loudest are 0, as is silence; row 0 is the lowest.

    Raises:
        UserError: ``rate`` is too low for 4000 Hz.
    """
    if rate < 2 * HIGHEST_HZ:
        raise UserError(f"{rate} samples a second are too few: {2 * HIGHEST_HZ:.0f} are needed")
    length = round(SECONDS * rate)
    samples = torch.nn.functional.pad(samples[:length], (0, max(0, length - len(samples))))
    hop = max(1, length // frames)
    window = 2 * hop
    # at least twice as fine as the lowest bands are wide
    size = 1 << max(math.ceil(math.log2(rate / 16)), (window - 1).bit_length())
    spectrum = torch.stft(
        samples,
        size,
        hop,
        window,
        torch.hann_window(window),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    power = spectrum.abs().square()[:, :frames]
    mel = _mel_bands(bands, size, rate) @ power
    loudest = mel.max()
    if not loudest > 0:
        return torch.zeros(1, bands, frames)
    db = 10 * torch.log10((mel / loudest).clamp(min=10 ** (-RANGE_DB / 10)))
    return (1 + db / RANGE_DB)[None]


def _mel_bands(bands: int, size: int, rate: int) -> Tensor:
    """``[bands, size/2 + 1]``: each row a triangle over the frequencies of a transform."""

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    steps = torch.linspace(mel(LOWEST_HZ), mel(HIGHEST_HZ), bands + 2, dtype=torch.float64)
    edges = 700 * (10 ** (steps / 2595) - 1)
    at = torch.linspace(0, rate / 2, size // 2 + 1, dtype=torch.float64)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (at - low) / (centre - low), (high - at) / (high - centre)
    return torch.minimum(rising, falling).clamp(min=0).float()
