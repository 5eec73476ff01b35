import numpy as np
import pytest

from nanods.data.speech import speak

pytest.importorskip("espeakng_loader")


def test_a_longer_text_takes_longer_and_is_heard():
    short, long = speak("cat", "en-us"), speak("cat, dog, horse and elephant", "en-us")
    assert short.dtype == np.float32 and 0.05 < abs(short).max() <= 1
    assert 0.2 * 8000 < len(short) < len(long) / 2


def test_voices_differ():
    first, second = (speak("horse", voice) for voice in ("en-us+m1", "en-us+f5"))
    n = min(len(first), len(second))
    spectra = [abs(np.fft.rfft(wave[:n])) for wave in (first, second)]
    assert np.corrcoef(spectra)[0, 1] < 0.9


def test_an_unknown_voice_is_an_error():
    with pytest.raises(ValueError, match="has no voice"):
        speak("cat", "no such voice")
