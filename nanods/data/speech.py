"""Speech from text, by espeak-ng (extra `emoji`): `speak("red heart", voice="en-us+f2")`.

The library libespeak-ng comes with the package espeakng-loader and is loaded when the first word
is spoken, through ctypes; none of its code is in nanods. espeak-ng is free software under the GPL,
version 3 or later. nanods is under the MIT licence: a program that ships both must follow the GPL.

A voice is a language or accent, such as "en-us" or "en-gb-scotland", optionally with a variant of
the speaker, such as "+f2" or "+m3". Two calls with the same arguments may differ in the noise of
the consonants, which espeak-ng draws from a state of its own.

Shapes: S samples of a waveform.
"""

import ctypes
from functools import cache

import numpy as np

from nanods.data.sound import resample
from nanods.errors import UserError

# Constants of espeak-ng's speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS = 2
CHARS_UTF8 = 1
RATE, PITCH = 1, 3  # parameters: words a minute; pitch from 0 to 100

SynthCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@cache
def load_espeak() -> tuple[ctypes.CDLL, int]:
    """Return the library, ready to speak, and its samples per second.

    Raises UserError if the package is missing or has no library for this machine.
    """
    try:
        import espeakng_loader
    except ImportError:
        raise UserError(
            "spoken names need the package espeakng-loader: `make setup EXTRAS=emoji`, or "
            "pip install 'nanods[emoji]'"
        ) from None
    try:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        data_path = espeakng_loader.get_data_path().encode()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the package espeakng-loader has no speech library for this machine ({error}): choose "
            "another --data"
        ) from None
    rate = library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, 0)
    if rate <= 0:
        raise UserError(
            "espeak-ng could not be initialised: install its package again, with "
            "pip install --force-reinstall espeakng-loader"
        )
    return library, rate


def speak(text: str, voice: str, words_per_minute: int = 175, pitch: int = 50) -> np.ndarray:
    """Return a text spoken by a voice: (S,) float32 in -1 .. 1, 8,000 Hz.

    Raises UserError if espeak-ng is missing, ValueError for a voice that it does not have.
    """
    library, rate = load_espeak()
    chunks = []

    @SynthCallback
    def receive(samples, count: int, events) -> int:
        if count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on

    library.espeak_SetSynthCallback(receive)
    if library.espeak_SetVoiceByName(voice.encode()):
        raise ValueError(f"espeak-ng has no voice {voice!r}")
    library.espeak_SetParameter(RATE, words_per_minute, 0)
    library.espeak_SetParameter(PITCH, pitch, 0)
    encoded = text.encode() + b"\0"
    library.espeak_Synth(encoded, len(encoded), 0, 1, 0, CHARS_UTF8, None, None)
    library.espeak_Synchronize()
    samples = np.concatenate(chunks) if chunks else np.zeros(0, np.int16)
    # Pad to a whole tenth of a second: a Fourier transform of a length with large prime factors is
    # slow.
    samples = np.pad(samples, (0, -len(samples) % (rate // 10)))
    return resample(samples.astype(np.float32) / 32768, rate)
