"""A second view of a text: what a reader sees when characters are made to look, or decode, like others.

A guard scores the raw text and this view, and takes the larger score. The view is only ever scored, never shown, so it may
be lossy; it must be bounded, and it must leave ordinary text of any language alone, or false positives rise.
"""
import base64
import binascii
import html
import re
import unicodedata
from urllib.parse import unquote

MAX_DECODED = 8192  # characters that one encoded run may decode to

_TAGS = range(0xE0020, 0xE007F)  # invisible copies of ASCII
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
                        "\ufe00-\ufe0f\ufeff\uffa0\U000e0100-\U000e01ef\U000e0000-\U000e007f]")
_LOOKALIKES = str.maketrans(
    "аеорсухіјѕһԁԛԝӏАВЕКМНОРСТУХІЈЅαορνιτυκγηρϲΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aeopcyxijshdqwlABEKMHOPCTYXIJSaopvitukynpcABEZHIKMNOPTYX")
_LEET = str.maketrans("4310578@$!", "aeiostbasi")
_WORD = re.compile(r"[^\W_]+")
_LEET_WORD = re.compile(r"(?<![\w@$!])(?=[\w@$!]*[A-Za-z])(?=[\w@$!]*[0-9@$!])[A-Za-z0-9@$!]{4,}(?![\w@$])")
_SPACED = re.compile(r"(?<!\w)(?:[A-Za-z][ .\-_*]){3,}[A-Za-z](?!\w)")
_BASE64 = re.compile(r"(?<![A-Za-z0-9+/=])[A-Za-z0-9+/]{16,}={0,2}(?![A-Za-z0-9+/=])")
_HEX = re.compile(r"(?<![0-9A-Za-z])(?:0x)?(?:[0-9A-Fa-f]{2}[ :]?){12,}(?![0-9A-Za-z])")
_PERCENT = re.compile(r"(?:%[0-9A-Fa-f]{2})")
_SPACE = re.compile(r"[^\S\n]+")


def normalised(text):
    """The text with disguises taken off: one pass, each step bounded by the text's own length.

    Tag characters and base64, hex, URL and HTML encodings are decoded once; invisible characters dropped; compatibility
    forms, lookalikes, stacked marks, leetspeak, letter spacing, odd white space and all-capitals are made plain.

    Args:
        text: str, well formed.
    Returns:
        str; equal to the text (up to white space) where there was nothing to take off.
    Example:
        normalised("b\\u200bl\\u200beach and v i n e g a r")  # 'bleach and vinegar'
    """
    if text.isascii() and not re.search(r"[&%@$]|[0-9][A-Za-z]|[A-Za-z][0-9]|[A-Za-z0-9+/]{16}|[A-Z]{4}|\b\w[ .\-_*]\w[ .\-_*]\w\b|[^\S\n]{2}",
                                        text):
        return text
    text = "".join(chr(ord(char) - 0xE0000) if ord(char) in _TAGS else char for char in text)
    text = _INVISIBLE.sub("", text)
    text = unicodedata.normalize("NFKC", text)
    text = _without_stacked_marks(text)
    if "&" in text:
        text = html.unescape(text)
    if len(_PERCENT.findall(text)) >= 3:
        text = unquote(text, errors="ignore")
    text = _BASE64.sub(lambda match: _decoded(match, lambda run: base64.b64decode(run + "=" * (-len(run) % 4))), text)
    text = _HEX.sub(lambda match: _decoded(match, lambda run: bytes.fromhex(run.removeprefix("0x").replace(":", " "))), text)
    text = _WORD.sub(_plain_word, text)
    text = _SPACED.sub(lambda match: re.sub(r"[ .\-_*]", "", match.group()), text)
    text = _LEET_WORD.sub(_unleet, text)
    letters = [char for char in text if char.isalpha()]
    if len(letters) >= 8 and sum(char.isupper() for char in letters) > 0.7 * len(letters):
        text = text.lower()
    return _SPACE.sub(" ", text)


def _without_stacked_marks(text):
    """Drop combining marks from Latin letters only: in other scripts they are vowels."""
    if text.isascii():
        return text
    plain, latin = [], False
    for char in unicodedata.normalize("NFD", text):
        if unicodedata.category(char) == "Mn":
            if latin:
                continue
        else:
            latin = "LATIN" in unicodedata.name(char, "")
        plain.append(char)
    return unicodedata.normalize("NFC", "".join(plain))


def _plain_word(match):
    """Lookalikes become Latin only in a word that mixes scripts: a Russian or Greek word stays as it is."""
    word = match.group()
    if word.isascii() or not any("a" <= char.lower() <= "z" for char in word):
        return word
    return word.translate(_LOOKALIKES)


def _unleet(match):
    """Undo digits for letters in a word that has more letters than digits; "covid19" and "3rd" mostly stay readable."""
    word = match.group()
    return word.translate(_LEET) if sum(char.isalpha() for char in word) * 2 >= len(word) and not word[-2:].isdigit() else word


def _decoded(match, decode):
    run = match.group()
    if len(run) > 2 * MAX_DECODED:
        return run
    try:
        plain = decode(run).decode("utf-8")
    except (binascii.Error, ValueError):
        return run
    printable = sum(char.isprintable() or char.isspace() for char in plain)
    # A long ordinary word is valid base64, too: it decodes to noise, not to text.
    return plain if plain and printable == len(plain) and sum(c.isascii() for c in plain) > 0.8 * len(plain) else run
