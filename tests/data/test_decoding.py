"""Bytes as text: byte order marks, other encodings, files that are no text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanods.data.decoding import decode_text, describe_format
from nanods.errors import UserError

TEXT = "Schöne Grüße, 你好, 🙂\r\nzweite Zeile\n"
TEXTS = {
    "gbk": "中国是一个历史悠久的国家\uff0c有着五千年的文明。我们今天去北京看长城。\n",
    "big5": "中國是一個歷史悠久的國家\uff0c有著五千年的文明。我們今天去北京看長城。\n",
    "shift_jis": "今日は天気がいいですね。私は東京へ行きました。カタカナも少しあります。\n",
    "euc-jp": "今日は天気がいいですね。私は東京へ行きました。\n",
    "euc-kr": "오늘은 날씨가 좋습니다. 나는 학교에 갑니다. 한국어 문장입니다.\n",
    "cp1251": "Сегодня хорошая погода. Мы идём в школу, и всё хорошо.\n",
    "latin1": "Überall schöne Grüße aus Köln, müßte für alle größer sein.\n",
}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_byte_order_mark_is_followed_and_dropped(encoding):
    mark = "\ufeff".encode(encoding) if encoding.endswith("be") else b""  # else Python writes it
    assert decode_text("a.txt", mark + TEXT.encode(encoding)) == TEXT
    with pytest.raises(UserError, match="the file is empty"):
        decode_text("a.txt", mark + "".encode(encoding))


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_utf8_stays_as_it_is(text):
    if not text.startswith("\ufeff"):
        assert decode_text("a.txt", text.encode()) == text
    assert decode_text("a.txt", text.encode(), offset=10) == text  # in the middle of a file


@pytest.mark.parametrize("encoding", TEXTS)
def test_the_encoding_that_bytes_look_like_is_named(encoding):
    data = b"plain line\n" + TEXTS[encoding].encode(encoding) * 3
    with pytest.raises(UserError, match=f"not UTF-8.*a guess.*iconv -f {encoding} -t utf-8"):
        decode_text("a.txt", data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXTS["cp1251"].encode("koi8-r"), "may be latin1, gbk, big5"),
        (TEXT.encode() * 9 + b"\xff" + TEXT.encode(), "1 damaged characters: iconv -c"),
        ("a line of UTF-16\n".encode("utf-16-le"), "looks like UTF-16: iconv -f utf-16le"),
        ("a line of UTF-16\n".encode("utf-16-be"), "looks like UTF-16: iconv -f utf-16be"),
        (b"abc\0def", "a binary file .a zero byte at 3.; give"),
        (b"\xff\xfea", "first bytes say UTF-16-LE, but"),
        (b"%PDF-1.4\n\xe2\xe3\xcf\xd3\n", "not a text, but a PDF document"),
        (b"PK\3\4\x14\0", "not a text, but a zip archive .*epub"),
        (b"\x1f\x8b\x08\0", "not a text, but a gzip archive"),
        (b"PAR1\x15\0", "not a text, but a Parquet file"),
    ],
)
def test_other_bytes_are_refused_with_advice(data, message):
    with pytest.raises(UserError, match=rf"--data a\.txt: .*{message}"):
        decode_text("a.txt", data)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("<!DOCTYPE html>\n<p>", "HTML"),
        ('<?xml version="1.0"?>', "XML"),
        ('{"text": "a"}\n{"text": "b"}\n', "JSON"),
        ('[\n {"title": 1}]', "JSON"),
        ("{\\rtf1 a}", "Rich Text"),
        ('label,text\n1,"a, b"\n0,c\n', "CSV"),
        ("BMW builds cars.\n[1] A note, too.\n", None),
        ("First, a line\nSecond, a line\nThird, a line\n", None),
        ("a,b\r c,d\n", None),
        ("", None),
    ],
)
def test_a_format_that_is_not_plain_text_is_named(text, kind):
    looks = describe_format(text)
    assert looks is None if kind is None else kind in looks
