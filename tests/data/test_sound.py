"""Sound: log_mel against explicit sums and known tones, resampling, WAV files good and damaged."""

import io
import struct
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanods.data.sound import (
    FLOOR,
    HOP,
    LOWEST,
    MELS,
    RATE,
    WINDOW,
    band_edges,
    crop_or_pad,
    decode_pcm,
    hertz,
    log_mel,
    mel,
    mel_filters,
    read_wav,
    resample,
    wav_seconds,
    write_wav,
)
from nanods.errors import UserError


def sine(hertz, samples=RATE, rate=RATE, loudness=0.5):
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)).astype(np.float32)


def wav(frames, channels=1, width=2, rate=RATE):
    """Return the bytes of a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", ""))
        out.writeframes(frames)
    return file.getvalue()


def wav_bytes(kind, bits, data, channels=1, rate=RATE, extensible=False, fmt_size=None):
    """Return a WAV file, byte by byte: RIFF, a chunk to skip, the format, the samples."""
    frame = channels * bits // 8
    tag = 0xFFFE if extensible else kind
    fmt = struct.pack("<HHIIHH", tag, channels, rate, rate * frame, frame, bits)
    if extensible:  # the valid bits, the loudspeakers, and a GUID that begins with the kind
        fmt += struct.pack("<HHIH", 22, bits, 4, kind)
        fmt += bytes.fromhex("000000001000800000aa00389b71")
    fmt = fmt[:fmt_size]
    odd = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # padded to an even size
    chunks = b"WAVE" + odd + b"fmt " + struct.pack("<I", len(fmt)) + fmt
    chunks += b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def read(data):
    return read_wav(io.BytesIO(data))


class TestLogMel:
    def test_equals_the_explicit_sums(self):
        """Hann, Fourier sum, triangles and logarithm in loops, on two frames."""
        samples = np.random.default_rng(0).uniform(-1, 1, WINDOW + HOP).astype(np.float32)
        step = (2595 * np.log10(1 + 4000 / 700) - 2595 * np.log10(1 + 60 / 700)) / (MELS + 1)
        edges = [
            700 * (10 ** ((2595 * np.log10(1 + 60 / 700) + i * step) / 2595) - 1)
            for i in range(MELS + 2)
        ]
        n = np.arange(WINDOW)
        window = np.sin(np.pi * n / WINDOW) ** 2
        expected = np.zeros((MELS, 2))
        for frame in range(2):
            piece = samples[frame * HOP : frame * HOP + WINDOW] * window
            for k in range(WINDOW // 2 + 1):
                power = (
                    abs((piece * np.exp(-2j * np.pi * k * n / WINDOW)).sum()) ** 2
                    / (window.sum() / 2) ** 2
                )
                at = k * RATE / WINDOW
                for m in range(MELS):
                    low, middle, high = edges[m : m + 3]
                    if low < at < high:
                        if at < middle:
                            weight = (at - low) / (middle - low)
                        else:
                            weight = (high - at) / (high - middle)
                        expected[m, frame] += power * weight
        np.testing.assert_allclose(log_mel(samples), 10 * np.log10(expected), atol=1e-3)

    @pytest.mark.parametrize("band", [0, 1, 5, 12, 20, 31])
    def test_a_tone_peaks_in_its_band(self, band):
        bands = log_mel(sine(band_edges()[band + 1]))
        assert bands.shape == (MELS, 1 + (RATE - WINDOW) // HOP)
        assert (bands.argmax(axis=0) == band).all()

    def test_decibels(self):
        """A full-scale tone in the middle of a band is about 0 dB; ten times softer is 20 dB less.

        The bins beside the peak of the tone add 1.8 dB.
        """
        tone = band_edges()[21]
        loud, soft = (log_mel(sine(tone, loudness=x))[20] for x in (1.0, 0.1))
        assert (abs(loud - 10 * np.log10(1.5)) < 0.7).all()
        np.testing.assert_allclose(loud - soft, 20, atol=0.1)

    def test_silence_is_the_floor(self):
        np.testing.assert_allclose(log_mel(np.zeros(RATE)), FLOOR, atol=1e-4)

    def test_any_number_of_waves(self):
        waves = np.random.default_rng(1).normal(0, 0.1, (2, 3, 2000)).astype(np.float32)
        all_at_once = log_mel(waves)
        assert all_at_once.shape == (2, 3, MELS, 6) and all_at_once.dtype == np.float32
        np.testing.assert_array_equal(all_at_once[1, 2], log_mel(waves[1, 2]))
        assert log_mel(waves[..., :WINDOW]).shape == (2, 3, MELS, 1)

    def test_too_short(self):
        with pytest.raises(ValueError, match="shorter than one frame"):
            log_mel(np.zeros(WINDOW - 1))

    def test_mel(self):
        assert mel(1000) == pytest.approx(1000, abs=0.1)  # the definition of the mel scale
        np.testing.assert_allclose(hertz(mel(np.array([60, 440, 4000]))), [60, 440, 4000])

    def test_the_bands_cover_all_frequencies_between_the_lowest_and_the_highest(self):
        filters, frequency = mel_filters(), np.arange(WINDOW // 2 + 1) * RATE / WINDOW
        assert filters.shape == (257, MELS) and (filters.max(axis=0) > 0.7).all()
        inside = (frequency > band_edges()[1]) & (frequency < band_edges()[-2])
        np.testing.assert_allclose(filters.sum(axis=1)[inside], 1, atol=1e-5)
        assert not filters[frequency <= LOWEST].any()


class TestResample:
    @pytest.mark.parametrize("rate", [1000, 7999, 11_025, 16_000, 44_100, 48_000])
    def test_a_tone_keeps_its_pitch(self, rate):
        actual = resample(sine(200, samples=rate, rate=rate), rate)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, sine(200), atol=1e-4)

    def test_frequencies_above_the_new_limit_are_removed_without_aliasing(self):
        assert abs(resample(sine(7000, 48_000, 48_000), 48_000)).max() < 1e-4

    def test_a_single_sample(self):
        np.testing.assert_allclose(resample(np.ones(1, np.float32), 48_000), [1])


def test_crop_or_pad():
    np.testing.assert_array_equal(crop_or_pad(np.arange(3.0), 5), [0, 1, 2, 0, 0])
    np.testing.assert_array_equal(crop_or_pad(np.arange(3.0), 2), [0, 1])


class TestFiles:
    def test_round_trip(self, tmp_path):
        samples = np.random.default_rng(0).uniform(-1, 1, 3000).astype(np.float32)
        write_wav(tmp_path / "a.wav", samples)
        actual = read_wav(tmp_path / "a.wav")
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, samples, atol=1 / 32768)
        # Samples that are multiples of 1 / 32768 are stored exactly.
        write_wav(str(tmp_path / "b.wav"), actual)
        np.testing.assert_array_equal(read_wav(str(tmp_path / "b.wav")), actual)
        with wave.open(str(tmp_path / "a.wav")) as file:
            assert file.getparams()[:4] == (1, 2, 8000, 3000)

    def test_samples_beyond_full_scale_are_clipped(self):
        file = io.BytesIO()
        write_wav(file, np.array([2.0, -2.0, 1.0, -1.0]))
        np.testing.assert_allclose(read(file.getvalue()), [1, -1, 1, -1], atol=1e-4)

    @pytest.mark.parametrize("samples", [np.zeros((2, 3)), np.array([np.nan]), np.array([np.inf])])
    def test_arrays_that_are_not_one_wave_are_refused(self, samples):
        with pytest.raises(ValueError, match="must be one wave of finite numbers"):
            write_wav(io.BytesIO(), samples)

    @pytest.mark.parametrize(
        ("width", "data"),
        [
            (1, bytes([0, 128, 192])),
            (2, struct.pack("<3h", -(2**15), 0, 2**14)),
            (3, b"\0\0\x80" + b"\0\0\0" + b"\0\0\x40"),
            (4, struct.pack("<3i", -(2**31), 0, 2**30)),
        ],
    )
    def test_widths(self, width, data):
        np.testing.assert_array_equal(decode_pcm(data, width), np.array([-1, 0, 0.5], np.float32))
        np.testing.assert_array_equal(
            read(wav(data, width=width)), np.array([-1, 0, 0.5], np.float32)
        )

    @pytest.mark.parametrize("extensible", [False, True])
    @pytest.mark.parametrize("channels", [1, 2, 6])
    @pytest.mark.parametrize(
        ("kind", "bits", "samples"),
        [
            (1, 8, bytes([0, 128, 192])),
            (1, 16, struct.pack("<3h", -(2**15), 0, 2**14)),
            (1, 24, b"\0\0\x80" + b"\0\0\0" + b"\0\0\x40"),
            (1, 32, struct.pack("<3i", -(2**31), 0, 2**30)),
            (3, 32, struct.pack("<3f", -1, 0, 0.5)),
            (3, 64, struct.pack("<3d", -1, 0, 0.5)),
        ],
    )
    def test_every_kind_of_sample(self, kind, bits, samples, channels, extensible):
        width = bits // 8
        each = [samples[i : i + width] * channels for i in range(0, len(samples), width)]
        actual = read(wav_bytes(kind, bits, b"".join(each), channels, extensible=extensible))
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, [-1, 0, 0.5], atol=1e-7)

    def test_a_size_that_its_writer_did_not_know(self):
        """A program that writes into a pipe cannot go back to the header."""
        data = wav_bytes(1, 16, struct.pack("<3h", -(2**15), 0, 2**14))
        at = data.index(b"data") + 4
        unknown = data[:at] + b"\xff" * 4 + data[at + 4 :]
        np.testing.assert_array_equal(read(unknown), read(data))

    @pytest.mark.parametrize("channels", [2, 5])
    def test_channels_become_their_mean(self, channels):
        both = np.zeros((100, channels), "<i2")
        both[:, 0] = 16384
        np.testing.assert_allclose(read(wav(both.tobytes(), channels=channels)), 0.5 / channels)

    def test_other_rates(self):
        stereo = np.stack([sine(300, 44_100, 44_100)] * 2, axis=1)
        frames = np.round(stereo * 32768).astype("<i2").tobytes()
        actual = read(wav(frames, channels=2, rate=44_100))
        np.testing.assert_allclose(actual, sine(300), atol=1e-3)


class CountingFile(io.BytesIO):
    """A file that counts the bytes that are read from it."""

    count = 0

    def read(self, size=-1):
        data = super().read(size)
        self.count += len(data)
        return data


class TestTheStartOfAFile:
    def test_at_8000_hz_it_is_the_start_of_the_whole(self):
        data = wav(np.round(sine(300, 3000) * 32768).astype("<i2").tobytes())
        whole = read(data)
        for samples in (1, 2999, 3000, 5000):
            np.testing.assert_array_equal(
                read_wav(io.BytesIO(data), samples), whole[:samples], strict=True
            )

    @pytest.mark.parametrize("rate", [7999, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
    def test_a_tone_keeps_its_pitch_and_its_start(self, rate):
        tone = np.round(sine(300, 3 * rate, rate) * 32768).astype("<i2")
        actual = read_wav(io.BytesIO(wav(tone.tobytes(), rate=rate)), 4000)
        np.testing.assert_allclose(actual, sine(300, 4000), atol=0.02)
        np.testing.assert_allclose(actual[80:], sine(300, 4000)[80:], atol=1e-3)

    def test_the_whole_file_is_used_if_it_is_hardly_longer(self):
        tone = np.round(sine(300, 16_000, 16_000) * 32768).astype("<i2")
        data = wav(tone.tobytes(), rate=16_000)
        np.testing.assert_array_equal(read_wav(io.BytesIO(data), 7900), read(data)[:7900])

    def test_no_more_is_read_than_needed(self):
        """An hour of stereo at 48,000 Hz is 691 MB; half a second of it is 240,000 bytes or so."""
        one_minute = CountingFile(wav(bytes(4 * 48_000 * 60), channels=2, rate=48_000))
        assert len(read_wav(one_minute, 4000)) == 4000
        assert one_minute.count < 4 * 48_000

    def test_the_length_in_seconds_is_read_from_the_header(self, tmp_path):
        file = CountingFile(wav(bytes(4 * 48_000 * 3), channels=2, rate=48_000))
        assert wav_seconds(file) == 3 and file.count < 100
        with pytest.raises(UserError, match=r"none\.wav: cannot be read"):
            wav_seconds(tmp_path / "none.wav")


GOOD = wav(np.round(sine(440, 50) * 32768).astype("<i2").tobytes())


class TestMistakes:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "not a WAV file of PCM or floats .the file is empty.; convert it.*ffmpeg"),
            (b"RIFF", "not a WAV file of PCM or floats .it ends too early.; convert it.*ffmpeg"),
            (b"words" * 9, "not a WAV file of PCM or floats .*RIFF"),
            (b"ID3\x04" * 20, "an MP3 sound under the name .wav; convert it.*ffmpeg"),
            (b"\xff\xfb\x90\0" * 20, "an MP3 sound under the name .wav; convert it.*ffmpeg"),
            (b"OggS" + bytes(40), "an Ogg sound under the name .wav"),
            (b"fLaC" + bytes(40), "a FLAC sound under the name .wav"),
            (b"\0\0\0 ftypM4A \0\0\0\0", "an M4A sound under the name .wav"),
            (b"RIFF\0\0\0\0WEBPVP8 ", "a WebP image under the name .wav"),
            (GOOD[:30], "not a WAV file"),
            (GOOD[:-10], "cut off, 90 bytes of sound where the header says 100: fetch it again"),
            (GOOD[:44], "cut off, 0 bytes"),
            (GOOD[:20] + b"\6\0" + GOOD[22:], "its samples are A-law.; convert it.*ffmpeg"),
            (GOOD[:20] + b"\7\0" + GOOD[22:], "its samples are mu-law.; convert it.*ffmpeg"),
            (GOOD[:20] + b"\x99\0" + GOOD[22:], "its samples are of the unknown format 153"),
            (GOOD[:20] + b"\3\0" + GOOD[22:], "16 bits a sample, and only.*of floats 32 and 64"),
            (GOOD[:32] + b"\4\0" + GOOD[34:], "4 bytes for 1 samples of 16 bits.; convert it"),
            (wav_bytes(1, 16, bytes(8), fmt_size=14), "it ends too early"),
            (wav_bytes(3, 32, struct.pack("<2f", 0, np.nan)), "samples of up to nan"),
            (wav_bytes(3, 64, struct.pack("<2d", 0, 1e300)), "samples of up to inf"),
            (wav_bytes(3, 32, struct.pack("<2f", 0, 3e4)), "up to 30,000, where 1 is full scale"),
            (GOOD[:22] + b"\0\0" + GOOD[24:], "not a WAV file"),  # no channels
            (
                GOOD[:34] + b"\x40\0" + GOOD[36:],
                "64 bits a sample, and only 8, 16, 24 and 32.*ffmpeg",
            ),
            (wav(b"\0\0", rate=50), "50 samples a second, and only 1,000 to 768,000.*ffmpeg"),
            (GOOD[:24] + b"\0\0\0\0" + GOOD[28:], "0 samples a second"),
            (wav(b""), "there is no sound in it"),
        ],
    )
    def test_damaged_and_unsupported_files(self, tmp_path, data, message):
        (tmp_path / "bad.wav").write_bytes(data)
        with pytest.raises(UserError, match=rf"bad\.wav: .*{message}"):
            read_wav(tmp_path / "bad.wav")

    @pytest.mark.parametrize("name", ["nothing.wav", "."])
    def test_a_missing_file(self, tmp_path, name):
        with pytest.raises(UserError, match=r"cannot be read .*give a WAV file"):
            read_wav(tmp_path / name)

    @settings(max_examples=300, deadline=None)
    @given(
        st.integers(0, len(GOOD)),
        st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4),
    )
    def test_a_damaged_file_gives_a_wave_or_a_user_error(self, end, changes):
        data = bytearray(GOOD)
        for position, value in changes:
            data[position] = value
        try:
            samples = read(bytes(data[:end]))
        except UserError as error:
            assert str(error).startswith("the sound: ")
        else:
            assert samples.ndim == 1 and len(samples) and np.isfinite(samples).all()
