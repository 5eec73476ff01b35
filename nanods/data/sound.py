"""Sound as arrays, in numpy: WAV files, resampling to 8,000 Hz, and the log-mel spectrogram.

A waveform is float32 in -1 .. 1 (1 is full scale), mono, 8,000 samples a second. A model reads it
as a picture of time and pitch, the log-mel spectrogram, which follows how people hear pitch:

    frames of 64 ms -> Hann window -> |FFT|^2 -> 32 triangles, evenly spaced in mel -> decibels

Left out on purpose: compressed formats (FLAC, MP3), WAV files of floats, dither, and any filter but
the FFT's own.

Shapes: S samples, N samples in a frame, T frames, M mel bands; `...` is any number of waves.
"""

import struct
import wave
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanods.errors import UserError

RATE = 8000  # samples a second; represents frequencies up to half of it, 4,000 Hz
WINDOW = 512  # samples in a frame (N), 64 ms: resolves frequencies that are 31 Hz apart
HOP = 256  # samples from the start of one frame to the next, 32 ms
MELS = 32  # mel bands (M)
LOWEST = 60  # Hz, the lower edge of the first band; the last band ends at RATE / 2
FLOOR = -80.0  # decibels; lower powers are raised to it

CONVERT = f"convert it, for example: ffmpeg -i OLD -ac 1 -ar {RATE} -c:a pcm_s16le NEW.wav"


# ---- the spectrogram -----------------------------------------------------------------------------


def mel(hertz):
    """Return the pitch in mel of a frequency in Hz. Equal steps in mel sound equally far apart."""
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def hertz(mel):
    """Return the frequency in Hz of a pitch in mel: the inverse of `mel`."""
    return 700 * (10 ** (np.asarray(mel) / 2595) - 1)


@cache
def hann() -> np.ndarray:
    """Return the Hann window, (N,) float32: 0 at the edges, 1 in the middle.

    Without it, the sharp edges of a frame would spread every tone over all frequencies.
    """
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


@cache
def band_edges() -> np.ndarray:
    """Return (M + 2,) frequencies in Hz, evenly spaced in mel.

    Band m rises from 0 at edge m to 1 at edge m + 1 and falls to 0 at edge m + 2.
    """
    return hertz(np.linspace(mel(LOWEST), mel(RATE / 2), MELS + 2))


@cache
def mel_filters() -> np.ndarray:
    """Return the weight of each FFT frequency in each band, (N / 2 + 1, M) float32."""
    frequency = np.arange(WINDOW // 2 + 1)[:, None] * RATE / WINDOW  # (N / 2 + 1, 1) Hz
    low, middle, high = band_edges()[:-2], band_edges()[1:-1], band_edges()[2:]  # (M,) each
    rise, fall = (frequency - low) / (middle - low), (high - frequency) / (high - middle)
    return np.clip(np.minimum(rise, fall), 0, None).astype(np.float32)


def log_mel(waves: np.ndarray) -> np.ndarray:
    """Return the log-mel spectrograms of waves: (..., S) in -1 .. 1 -> (..., M, T) float32.

    The unit is decibels: 0 is a full-scale tone in the middle of a band. T = 1 + (S - N) // HOP,
    since each frame lies completely within the wave.

    Raises ValueError if the wave is shorter than a frame.
    """
    if waves.shape[-1] < WINDOW:
        raise ValueError(
            f"a wave of {waves.shape[-1]} samples is shorter than one frame of {WINDOW}"
        )
    waves = np.asarray(waves, np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(waves, WINDOW, axis=-1)
    frames = windows[..., ::HOP, :]  # (..., T, N)
    spectrum = np.fft.rfft(frames * hann())  # (..., T, N / 2 + 1)
    full_scale = (hann().sum() / 2) ** 2  # power of a full-scale tone at its frequency
    power = (spectrum.real**2 + spectrum.imag**2) / full_scale
    # One matrix product for each wave, so the result for a wave does not depend on the others.
    bands = power @ mel_filters()  # (..., T, M)
    decibels = 10 * np.log10(np.maximum(bands, np.float32(10 ** (FLOOR / 10))))
    return np.ascontiguousarray(np.swapaxes(decibels, -1, -2))


def normalized_log_mel(waves: np.ndarray) -> np.ndarray:
    """Return the model's input, (..., S) -> (..., M, T): `log_mel` with mean near 0 and std near 1.

    The constants fit the sounds of nanods/data/scenes.py.
    """
    return (log_mel(waves) + 44) / 10


# ---- rates and lengths ---------------------------------------------------------------------------


def resample(samples: np.ndarray, rate: int, to: int = RATE) -> np.ndarray:
    """Resample (S,) samples from `rate` Hz to `to` Hz: return about (S * to / rate,) samples.

    The spectrum is truncated, or padded with zeros. This is exact for a periodic signal; otherwise
    the two ends of the wave ring a little into each other.
    """
    if rate == to:
        return samples
    length = max(1, round(len(samples) * to / rate))
    spectrum = np.fft.rfft(samples)[: length // 2 + 1]
    return (np.fft.irfft(spectrum, length) * (length / len(samples))).astype(np.float32)


def crop_or_pad(samples: np.ndarray, length: int) -> np.ndarray:
    """Return the first `length` samples, padded with silence at the end: (S,) -> (length,)."""
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


# ---- files ---------------------------------------------------------------------------------------


def write_wav(file: str | Path | BinaryIO, samples: np.ndarray) -> None:
    """Write (S,) samples as a WAV file: 16-bit PCM, mono, 8,000 Hz, to a path or an open file.

    Samples outside -1 .. 1 are clipped. Raises ValueError if `samples` is not one wave of finite
    numbers.
    """
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ValueError(
            f"samples must be one wave of finite numbers, not an array of shape {samples.shape}"
        )
    if isinstance(file, str | Path):
        with Path(file).open("wb") as opened_file:
            return write_wav(opened_file, samples)
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, RATE, len(samples), "NONE", "not compressed"))
        out.writeframes(np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2").tobytes())


def read_wav(file: str | Path | BinaryIO) -> np.ndarray:
    """Read a WAV file as (S,) float32 samples, mono, 8,000 Hz: the channels' mean, resampled.

    It reads 8, 16, 24 and 32-bit PCM, any number of channels, 1,000 to 768,000 samples a second.

    Raises UserError if the file is missing, damaged or of another kind.
    """
    if isinstance(file, str | Path):
        try:
            with Path(file).open("rb") as opened_file:
                return read_wav(opened_file)
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read ({error.strerror}); give a WAV file"
            ) from error
    name = getattr(file, "name", "the sound")
    try:
        with wave.open(file, "rb") as source:
            channels, width, rate, count, _, _ = source.getparams()
            data = source.readframes(count)
    except (wave.Error, EOFError, RuntimeError, struct.error) as error:  # damage raises these
        reason = str(error) or "it ends too early"
        raise UserError(f"{name}: not a WAV file of plain PCM ({reason}); {CONVERT}") from error
    if width > 4:
        raise UserError(
            f"{name}: {8 * width} bits a sample, and only 8, 16, 24 and 32 are read; {CONVERT}"
        )
    if not 1000 <= rate <= 768_000:
        raise UserError(
            f"{name}: {rate:,} samples a second, and only 1,000 to 768,000 are read; {CONVERT}"
        )
    expected = count * channels * width  # bytes, by the header
    if len(data) < expected:
        raise UserError(
            f"{name}: cut off, {len(data):,} bytes of sound where the header says {expected:,}: "
            "fetch it again"
        )
    if count == 0:
        raise UserError(f"{name}: there is no sound in it: record it again")
    samples = decode_pcm(data, width).reshape(-1, channels)
    return resample(samples.mean(axis=1, dtype=np.float32), rate)


def decode_pcm(data: bytes, width: int) -> np.ndarray:
    """Return little-endian PCM samples of `width` bytes as float32 in -1 .. 1.

    WAV stores samples of one byte as unsigned integers, wider ones as signed integers.
    """
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    sample_bytes = np.frombuffer(data, np.uint8).reshape(-1, width)
    # Put them into the upper bytes of 32-bit integers, where the sign bit is.
    padded = np.zeros((len(sample_bytes), 4), np.uint8)
    padded[:, 4 - width :] = sample_bytes
    return padded.view("<i4")[:, 0].astype(np.float32) / 2**31
