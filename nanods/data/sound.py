"""Sound as arrays, in numpy: WAV files, resampling to 8,000 Hz, and the log-mel spectrogram.

A waveform is float32 in -1 .. 1 (1 is full scale), mono, 8,000 samples a second. A model reads it
as a picture of time and pitch, the log-mel spectrogram, which follows how people hear pitch:

    frames of 64 ms -> Hann window -> |FFT|^2 -> 32 triangles, evenly spaced in mel -> decibels

Left out on purpose: compressed formats (FLAC, MP3, A-law), dither, and any filter but the FFT's
own.

Shapes: S samples, N samples in a frame, T frames, M mel bands; `...` is any number of waves.
"""

import os
import struct
import wave
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from math import ceil, gcd
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanods.data.file_types import wrong_type
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


def samples_of(frames: int) -> int:
    """Return how many samples a spectrogram of so many frames reads."""
    return WINDOW + (frames - 1) * HOP


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


PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
COMPRESSED = {
    2: "ADPCM",
    6: "A-law",
    7: "mu-law",
    17: "ADPCM",
    49: "GSM 6.10",
    80: "MPEG",
    85: "MP3",
}
WIDTHS = {PCM: (1, 2, 3, 4), FLOAT: (4, 8)}  # bytes of a sample
UNKNOWN_SIZE = 0xFFFFFFFF  # of the sound, written by programs that cannot go back to the header
MAX_CHUNKS = 1000  # before the sound
FADE = 800  # samples at RATE: the end of a part of a sound, which is faded out before resampling
LOUDEST = 100.0  # floats above it do not have 1 as full scale


@dataclass(frozen=True)
class WavHeader:
    """What the header of a WAV file says."""

    kind: int  # PCM or FLOAT
    width: int  # bytes of a sample
    channels: int
    rate: int  # samples a second
    samples: int  # of each channel
    start: int  # position of the first sample in the file


def read_wav(file: str | Path | BinaryIO, samples: int | None = None) -> np.ndarray:
    """Read a WAV file as (S,) float32 samples, mono, 8,000 Hz: the channels' mean, resampled.

    With `samples`, return at most so many from the start, and read no more of the file than they
    need. It reads PCM of 8, 16, 24 and 32 bits and floats of 32 and 64 bits, any number of
    channels, 1,000 to 768,000 samples a second.

    Raises UserError if the file is missing, damaged or of another kind.
    """
    try:
        with opened(file) as source:
            header = read_wav_header(source)
            count = min(header.samples, samples_to_read(samples, header.rate))
            source.seek(header.start)
            data = source.read(count * header.channels * header.width)
    except OSError as error:
        raise unreadable(file, error) from error
    values = decode_samples(data, header)
    peak = abs(values).max()
    if not peak <= LOUDEST:  # or not a number
        raise UserError(
            f"{name_of(file)}: samples of up to {peak:,.0f}, where 1 is full scale: divide them by "
            "the largest, or store them as 16-bit PCM"
        )
    mono = values.reshape(-1, header.channels).mean(axis=1, dtype=np.float32)
    if count < header.samples and header.rate != RATE:
        # Resampling joins the end of a wave to its start: let no sudden end ring into the start.
        fade = FADE * header.rate // RATE
        mono[-fade:] *= 0.5 + 0.5 * np.cos(np.pi * np.arange(fade, dtype=np.float32) / fade)
    return resample(mono, header.rate)[:samples]


def wav_seconds(file: str | Path | BinaryIO) -> float:
    """Return the length of a WAV file in seconds, by its header. Raises UserError as `read_wav`."""
    try:
        with opened(file) as source:
            header = read_wav_header(source)
    except OSError as error:
        raise unreadable(file, error) from error
    return header.samples / header.rate


def opened(file: str | Path | BinaryIO):
    """Return a context that opens a path for reading, and leaves an open file open."""
    return Path(file).open("rb") if isinstance(file, str | Path) else nullcontext(file)


def name_of(file: str | Path | BinaryIO, otherwise: str = "the sound") -> str:
    """Return the name of a file, for messages; `otherwise` for bytes in memory."""
    return str(file if isinstance(file, str | Path) else getattr(file, "name", otherwise))


def unreadable(file: str | Path | BinaryIO, error: OSError) -> UserError:
    return UserError(
        f"{name_of(file)}: cannot be read ({error.strerror or error}); give a WAV file"
    )


def samples_to_read(samples: int | None, rate: int) -> float:
    """Return how many samples to read at `rate` Hz to have `samples` of them at 8,000 Hz.

    They last as long as a whole number of samples at 8,000 Hz, so `resample` keeps the pitch.
    """
    if samples is None:
        return float("inf")
    if rate == RATE:
        return samples
    unit = rate // gcd(rate, RATE)
    return ceil((samples + FADE) * rate / RATE / unit) * unit


def read_wav_header(file: BinaryIO) -> WavHeader:
    """Return the header of an opened WAV file, whose sound is complete.

    Raises UserError if it is damaged, cut off or of another kind.
    """
    name = name_of(file)
    try:
        format_chunk, start, size = find_chunks(file)
        kind, width, channels, rate = parse_format(format_chunk)
    except (ValueError, struct.error) as error:
        file.seek(0)
        if (kind := wrong_type(name, file.read(32), (".wav", ".wave"))) and "WAV" not in kind:
            raise UserError(f"{name}: {kind}; {CONVERT}") from error
        reason = "it ends too early" if isinstance(error, struct.error) else str(error)
        raise UserError(f"{name}: not a WAV file of PCM or floats ({reason}); {CONVERT}") from error
    if not 1000 <= rate <= 768_000:
        raise UserError(
            f"{name}: {rate:,} samples a second, and only 1,000 to 768,000 are read; {CONVERT}"
        )
    existing = max(0, file.seek(0, os.SEEK_END) - start)  # bytes
    if size == UNKNOWN_SIZE:
        size = existing
    if existing < size:
        raise UserError(
            f"{name}: cut off, {existing:,} bytes of sound where the header says {size:,}: "
            "fetch it again"
        )
    samples = size // (channels * width)
    if samples == 0:
        raise UserError(f"{name}: there is no sound in it: record it again")
    return WavHeader(kind, width, channels, rate, samples, start)


def find_chunks(file: BinaryIO) -> tuple[bytes, int, int]:
    """Return the format chunk of a WAV file, and the position and size in bytes of its sound.

    A WAV file is a list of chunks: a name of 4 bytes, the size, and so many bytes, padded to even.
    Raises ValueError or struct.error for another kind of file and for one that ends too early.
    """
    file.seek(0)
    head = file.read(12)
    if not head:
        raise ValueError("the file is empty")
    riff, _, form = struct.unpack("<4sI4s", head)
    if riff != b"RIFF" or form != b"WAVE":
        raise ValueError("it does not begin with RIFF and WAVE")
    format_chunk = None
    for _ in range(MAX_CHUNKS):
        name, size = struct.unpack("<4sI", file.read(8))
        if name == b"data" and format_chunk is None:
            raise ValueError("the sound comes before its format")
        if name == b"data":
            return format_chunk, file.tell(), size
        next_chunk = file.tell() + size + size % 2
        if name == b"fmt ":
            format_chunk = file.read(min(size, 40))  # of an extensible one; others are shorter
        file.seek(next_chunk)
    raise ValueError(f"there is no sound in its first {MAX_CHUNKS:,} chunks")


def parse_format(chunk: bytes) -> tuple[int, int, int, int]:
    """Return the kind, the bytes of a sample, the channels and the rate of a format chunk.

    Raises ValueError for a kind that is not read, struct.error for a chunk that is too short.
    """
    kind, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", chunk)
    if kind == EXTENSIBLE:  # the kind is in the first bytes of a GUID
        (kind,) = struct.unpack_from("<H", chunk, 24)
    if kind not in WIDTHS:
        raise ValueError(f"its samples are {COMPRESSED.get(kind, f'of the unknown format {kind}')}")
    width = -(-bits // 8)  # samples of 12 or 20 bits are stored in the upper bits of whole bytes
    if width not in WIDTHS[kind]:
        raise ValueError(
            f"{bits} bits a sample, and only 8, 16, 24 and 32 are read, and of floats 32 and 64"
        )
    if channels == 0:
        raise ValueError("it has no channels")
    if frame_bytes != channels * width:
        raise ValueError(f"{frame_bytes} bytes for {channels} samples of {bits} bits")
    return kind, width, channels, rate


def decode_samples(data: bytes, header: WavHeader) -> np.ndarray:
    """Return the samples of a WAV file as float32, 1 for full scale, the channels in turns."""
    if header.kind == PCM:
        return decode_pcm(data, header.width)
    with np.errstate(over="ignore"):  # 64-bit floats that are too large become inf
        return np.frombuffer(data, f"<f{header.width}").astype(np.float32)


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
