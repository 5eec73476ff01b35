"""Sound as arrays: WAV files to and from waveforms, other rates to 8,000 Hz, and the log-mel spectrogram, in numpy.

A waveform is float32 in -1 .. 1 (1: full scale), 8,000 samples a second, mono. What a model sees of it is a picture of time
and pitch, `log_mel`, since an ear hears frequencies and not samples:

    frames of 64 ms -> Hann window -> |FFT|^2 -> 32 triangles, evenly spaced in mel -> decibels

Left out on purpose: compressed formats (FLAC, MP3), WAV files of floats, dither, and any filter but the FFT's own.

Shapes: S samples, N samples in a frame, T frames, M mel bands; `...` is any number of waves.
"""

import struct
import wave
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanods.errors import UserError

RATE = 8000  # samples a second; nothing above half of it, 4,000 Hz, can be normalized_log_mel
WINDOW = 512  # samples of a frame (N), 64 ms: frequencies 31 Hz apart are told apart
HOP = 256  # samples from one frame to the next, 32 ms
MELS = 32  # bands (M)
LOWEST = 60  # Hz, where the first band begins; the last one ends at RATE / 2
FLOOR = -80.0  # decibels; what is softer counts as this

CONVERT = f"convert it, for example: ffmpeg -i OLD -ac 1 -ar {RATE} -c:a pcm_s16le NEW.wav"


# ---- the spectrogram ---------------------------------------------------------------------------------------------------------


def mel(hertz):
    """Pitch as it is normalized_log_mel: equal steps of mel sound equally far apart. Hz -> mel."""
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def hertz(mel):
    """The inverse: mel -> Hz."""
    return 700 * (10 ** (np.asarray(mel) / 2595) - 1)


@cache
def hann() -> np.ndarray:
    """(N,) float32, 0 at the edges and 1 in the middle: a frame cut out hard would smear every tone over all frequencies."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


@cache
def band_edges() -> np.ndarray:
    """(M + 2,) Hz, evenly spaced in mel: band m rises from edge m to 1 at edge m + 1 and falls to 0 at edge m + 2."""
    return hertz(np.linspace(mel(LOWEST), mel(RATE / 2), MELS + 2))


@cache
def mel_filters() -> np.ndarray:
    """(N / 2 + 1, M) float32: how much of the power at each frequency of the FFT goes to each band."""
    frequency = np.arange(WINDOW // 2 + 1)[:, None] * RATE / WINDOW  # (N / 2 + 1, 1) Hz
    low, middle, high = band_edges()[:-2], band_edges()[1:-1], band_edges()[2:]  # (M,) each
    rise, fall = (frequency - low) / (middle - low), (high - frequency) / (high - middle)
    return np.clip(np.minimum(rise, fall), 0, None).astype(np.float32)


def log_mel(waves: np.ndarray) -> np.ndarray:
    """waves (..., S) in -1 .. 1 -> (..., M, T) float32 in decibels: 0 is a full-scale tone in the middle of a band.

    T = 1 + (S - N) // HOP: a frame lies wholly within the wave. ValueError if the wave is shorter than a frame.
    """
    if waves.shape[-1] < WINDOW:
        raise ValueError(
            f"a wave of {waves.shape[-1]} samples is shorter than one frame of {WINDOW}"
        )
    waves = np.asarray(waves, np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(waves, WINDOW, axis=-1)[
        ..., ::HOP, :
    ]  # (..., T, N)
    spectrum = np.fft.rfft(frames * hann())  # (..., T, N / 2 + 1)
    power = (spectrum.real**2 + spectrum.imag**2) / (
        hann().sum() / 2
    ) ** 2  # 1 where a full-scale tone stands
    bands = (
        power @ mel_filters()
    )  # (..., T, M); one product for each wave, so a wave's numbers do not depend on the others
    decibels = 10 * np.log10(np.maximum(bands, np.float32(10 ** (FLOOR / 10))))
    return np.ascontiguousarray(np.swapaxes(decibels, -1, -2))


# ---- rates and lengths -------------------------------------------------------------------------------------------------------


def resample(samples: np.ndarray, rate: int, to: int = RATE) -> np.ndarray:
    """samples (S,) at `rate` Hz -> about (S to / rate,) at `to` Hz: the spectrum is cut off, or filled up with zeros.

    Exact for what repeats; elsewhere the two ends ring a little into each other.
    """
    if rate == to:
        return samples
    length = max(1, round(len(samples) * to / rate))
    spectrum = np.fft.rfft(samples)[: length // 2 + 1]
    return (np.fft.irfft(spectrum, length) * (length / len(samples))).astype(np.float32)


def fit(samples: np.ndarray, length: int) -> np.ndarray:
    """The first `length` samples; silence behind where there are fewer: (S,) -> (length,)."""
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


# ---- files -------------------------------------------------------------------------------------------------------------------


def write_wav(file: str | Path | BinaryIO, samples: np.ndarray) -> None:
    """samples (S,) in -1 .. 1 (beyond is clipped) -> a WAV file: 16-bit PCM, mono, 8,000 Hz, to a path or an open file.

    ValueError if `samples` is not one wave of finite numbers.
    """
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ValueError(
            f"one wave of finite numbers is wanted, not an array of shape {samples.shape}"
        )
    if isinstance(file, str | Path):
        with Path(file).open("wb") as opened:
            return write_wav(opened, samples)
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, RATE, len(samples), "NONE", "not compressed"))
        out.writeframes(np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2").tobytes())


def read_wav(file: str | Path | BinaryIO) -> np.ndarray:
    """A WAV file of 8, 16, 24 or 32-bit PCM, any number of channels, 1,000 to 768,000 Hz -> (S,) float32, mono, 8,000 Hz.

    The channels' mean, resampled. UserError, with a mend, for what is missing, damaged or of another kind.
    """
    if isinstance(file, str | Path):
        try:
            with Path(file).open("rb") as opened:
                return read_wav(opened)
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read ({error.strerror}); give a WAV file"
            ) from error
    name = getattr(file, "name", "the sound")
    try:
        with wave.open(file, "rb") as source:
            channels, width, rate, count, _, _ = source.getparams()
            data = source.readframes(count)
    except (
        wave.Error,
        EOFError,
        RuntimeError,
        struct.error,
    ) as error:  # what the library raises on damage
        reason = str(error) or "it ends too early"
        raise UserError(f"{name}: not a WAV file of plain PCM ({reason}); {CONVERT}") from error
    announced = count * channels * width  # bytes
    faults = {
        f"{8 * width} bits a sample, and only 8, 16, 24 and 32 are read; {CONVERT}": width > 4,
        f"{rate:,} samples a second, and only 1,000 to 768,000 are read; {CONVERT}": not 1000
        <= rate
        <= 768_000,
        f"cut off, {len(data):,} bytes of sound where {announced:,} are announced: fetch it again": len(
            data
        )
        < announced,
        "there is no sound in it: record it again": count == 0,
    }
    for fault, there in faults.items():
        if there:
            raise UserError(f"{name}: {fault}")
    return resample(pcm(data, width).reshape(-1, channels).mean(axis=1, dtype=np.float32), rate)


def pcm(data: bytes, width: int) -> np.ndarray:
    """Little-endian samples of `width` bytes -> float32 in -1 .. 1. One byte is unsigned, more are signed: WAV's custom."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    low = np.frombuffer(data, np.uint8).reshape(-1, width)
    high = np.zeros((len(low), 4), np.uint8)
    high[:, 4 - width :] = low  # as the upper bytes of 32 bits, where the sign is
    return high.view("<i4")[:, 0].astype(np.float32) / 2**31
