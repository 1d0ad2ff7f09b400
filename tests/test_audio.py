"""Sound for `resfast train`: wav files, log-mel spectrograms, folders of recordings."""

from __future__ import annotations

import math
import tarfile
import wave
from pathlib import Path

import pytest
import torch

from resfast.training.audio import _mel_bands, log_mel, read_wav
from resfast.training.config import TrainConfig, UserError
from resfast.training.data import load_dataset

RATE = 8000
ARCHIVE = Path(__file__).parents[2] / "shared" / "data" / "fsdd-wav.tar.xz"


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate)) / rate)


def write_wav(path: Path, samples: torch.Tensor, rate: int = RATE, width: int = 2, channels=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = 2 ** (8 * width - 1)
    values = (samples.double() * scale).round().clamp(-scale, scale - 1).long()
    if width == 1:
        values = values + 128
    data = b"".join(int(v).to_bytes(width, "little", signed=width > 1) for v in values)
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(data)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_every_width(tmp_path, width):
    samples = torch.tensor([0.0, 0.5, -0.5, -1.0, 0.25, 0.9])
    write_wav(tmp_path / "a.wav", samples, width=width)
    found, rate = read_wav(tmp_path / "a.wav")
    assert rate == RATE
    # half a step
    torch.testing.assert_close(found, samples, atol=1.01 * 2.0 ** (-8 * width), rtol=1e-6)


def test_channels_are_averaged(tmp_path):
    left, right = torch.tensor([0.5, 0.25, -0.5]), torch.tensor([0.0, 0.75, 0.5])
    write_wav(tmp_path / "a.wav", torch.stack([left, right], 1).flatten(), channels=2)
    torch.testing.assert_close(read_wav(tmp_path / "a.wav")[0], (left + right) / 2)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"no sound at all, but long enough to look at"])
def test_what_is_no_wav_is_named(tmp_path, content):
    path = tmp_path / "broken.wav"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read sound .*broken\.wav: \w"):
        read_wav(path)
    with pytest.raises(UserError, match="no sound at"):
        read_wav(tmp_path / "missing.wav")


@pytest.mark.parametrize("hertz", [200.0, 700.0, 1500.0, 3000.0])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_a_tone_is_in_its_band_at_any_rate(hertz, rate):
    mel = [2595 * math.log10(1 + f / 700) for f in (20.0, 4000.0, hertz)]
    expected = (mel[2] - mel[0]) / (mel[1] - mel[0]) * 41 - 1
    spectrogram = log_mel(tone(hertz, rate=rate), rate, 40, 40)
    assert spectrogram.shape == (1, 40, 40)
    loudest = spectrogram[0, :, 5:35].argmax(0)
    assert ((loudest - expected).abs() <= 1).all()
    assert spectrogram.max() == 1
    assert spectrogram.min() >= 0


def test_bands_are_triangles_that_add_up_to_one_between_the_outer_centres():
    bands = _mel_bands(40, 512, RATE)
    assert (bands.sum(1) > 0).all(), "no band without a frequency"
    peaks = bands.argmax(1)
    assert (peaks.diff() > 0).all()
    inner = bands[:, peaks[0] + 1 : peaks[-1]]
    torch.testing.assert_close(inner.sum(0), torch.ones(inner.shape[1]))


@pytest.mark.parametrize("rate", [8000, 16000])
def test_no_band_is_empty_however_short_the_frames(rate):
    assert (log_mel(torch.randn(rate), rate, 80, 200)[0].amax(1) > 0.5).all()


def test_loudness_and_what_follows_the_first_second_do_not_matter():
    clip = tone(900, 0.4)
    expected = log_mel(clip, RATE, 40, 40)
    torch.testing.assert_close(log_mel(clip / 50, RATE, 40, 40), expected, atol=1e-4, rtol=0)
    assert (expected[0, :, 25:] == 0).all(), "silence behind the clip"
    long = torch.cat([tone(900, 1.0), tone(2500, 1.0)])
    torch.testing.assert_close(
        log_mel(long, RATE, 40, 40)[..., :38], log_mel(tone(900), RATE, 40, 40)[..., :38]
    )


def test_silence_is_zero_and_a_low_rate_is_refused():
    assert (log_mel(torch.zeros(4000), RATE, 40, 40) == 0).all()
    with pytest.raises(UserError, match="4000 samples a second are too few"):
        log_mel(torch.zeros(4000), 4000, 40, 40)


def _recordings(folder: Path) -> None:
    for digit, hertz in enumerate((400, 1500)):
        for speaker in ("ann", "bob"):
            for take in range(12):
                clip = tone(hertz + 10 * take, 0.3)
                write_wav(folder / f"{digit}_{speaker}_{take}.wav", clip)


def test_recordings_are_split_by_take(tmp_path):
    _recordings(tmp_path)
    data = load_dataset(TrainConfig(data=str(tmp_path)))
    assert data.classes == ["0", "1"]
    assert data.image_shape == (1, 40, 40)
    assert data.sizes() == {"train": 26, "validation": 2, "test": 20}
    low, high = (data.test.pixels[data.test.labels == i].mean((0, 1, 3)) for i in (0, 1))
    assert low.argmax() < high.argmax()
    assert load_dataset(TrainConfig(data=str(tmp_path), image_size=16)).image_shape == (1, 16, 16)


def test_sounds_in_class_folders(tmp_path):
    for name, hertz in (("hum", 300), ("whistle", 2500)):
        for i in range(10):
            write_wav(tmp_path / name / f"{i}.wav", tone(hertz, 0.2))
    data = load_dataset(TrainConfig(data=str(tmp_path)))
    assert data.classes == ["hum", "whistle"]
    assert data.sizes() == {"train": 14, "validation": 2, "test": 4}


def test_bad_sounds_fail_or_are_skipped_by_name(tmp_path):
    _recordings(tmp_path)
    (tmp_path / "1_ann_7.wav").write_bytes(b"RIFF")
    (tmp_path / "0_bob_9.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"0_bob_9\.wav.*and 1 more.*--bad-files skip"):
        load_dataset(TrainConfig(data=str(tmp_path)))
    with pytest.warns(UserWarning, match=r"left out: .*1_ann_7\.wav"):
        data = load_dataset(TrainConfig(data=str(tmp_path), bad_files="skip"))
    assert data.skipped == 2
    assert sum(data.sizes().values()) == 46


@pytest.mark.skipif(not ARCHIVE.exists(), reason="needs ../shared/data/fsdd-wav.tar.xz")
def test_spoken_digits_have_their_official_split(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    data = load_dataset(TrainConfig(data=str(tmp_path / "recordings")))
    assert data.classes == [str(i) for i in range(10)]
    assert data.sizes()["test"] == 300
    assert data.test.labels.bincount().tolist() == [30] * 10
