"""Text of the user (captions, tokens, names of files) as a picture can show it: `safe_text`."""

import unicodedata

import numpy as np


def safe_text(text: str, max_columns: int = 150, line_columns: int | None = None) -> str:
    """Return a text of the user (a caption, a token, a file name) as a picture can show it.

    Control characters become visible, what exceeds `max_columns` becomes an ellipsis, and `$` is
    escaped: matplotlib would read what two of them enclose as mathematics. With `line_columns` the
    text is wrapped into lines of about equal length.
    """
    start = text[: 2 * max_columns]  # combining characters take no column of their own
    visible = "".join(map(visible_character, start))
    if len(start) < len(text) or columns(visible) > max_columns:
        visible = wrap(visible, max_columns - 2)[0] + " \u2026"
    if line_columns:
        visible = balanced_lines(visible, line_columns)
    return visible.replace("$", r"\$")


def visible_character(character: str) -> str:
    """Return what to show for a character: itself, or an escape such as \\x00 for one that prints
    nothing or cannot be encoded."""
    if character in "\n\t":
        return "\u21b5" if character == "\n" else "\u21e5"
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    return ascii(character)[1:-1] if is_control else character


def columns(text: str) -> int:
    """Return the width of a text in columns: a full-width character, such as a Chinese one, takes
    two, a combining one none."""
    return sum(map(character_columns, text))


def character_columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def wrap(text: str, width: int) -> list[str]:
    """Return the lines of a text, each at most `width` columns wide (at least 2): broken at blanks,
    beside full-width characters, and where a word is longer than a line."""
    lines = []
    while columns(text) > width:
        ends = np.cumsum([character_columns(character) for character in text])
        fitting = max(1, int(np.searchsorted(ends, width, side="right")))
        cut = fitting
        for i in range(fitting, 0, -1):
            before, after = text[i - 1], text[i]
            if " " in (before, after) or 2 in (character_columns(before), character_columns(after)):
                cut = i
                break
        lines.append(text[:cut].rstrip(" "))
        text = text[cut:].lstrip(" ")
    return [*lines, text]


def balanced_lines(text: str, width: int) -> str:
    """Wrap a text into as few lines as `width` allows, of about equal length."""
    fewest = len(wrap(text, width))
    narrow = next(w for w in range(2, width + 1) if len(wrap(text, w)) == fewest)
    return "\n".join(wrap(text, narrow))
