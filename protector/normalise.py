"""A second view of a text: what a reader sees when characters are made to look, or decode, like others.

A guard scores the raw text and this view, and takes the larger score. The view is only ever scored, never shown, so it may
be lossy; it must be bounded, and it must be equal to ordinary text of any language, or false positives and cost rise.

Trap: everything here runs on hostile text. Each step is linear in it: no pattern starts at every character of a run and
reads to its end, and unicodedata.normalize, which sorts a run of marks in quadratic time, sees a few characters at once.
"""
import base64
import binascii
import html
import re
import unicodedata
from functools import lru_cache
from urllib.parse import unquote

_LATIN = "A-Za-z\u00aa-\u02af\u1d00-\u1dbf\u1e00-\u1eff"
_LETTER = _LATIN + "\u0370-\u052f\u1f00-\u1fff"  # and Greek and Cyrillic, which lend lookalikes
_MARK = ("\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
         "\u0591-\u05bd\u05bf\u05c1\u05c2\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u093c\u0951-\u0954\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
         "\u1cd0-\u1cf9\u2de0-\u2dff\u302a-\u302f\u3099\u309a\ua66f\ua674-\ua67d\ua8e0-\ua8f1\U0001e000-\U0001e02a")  # from the second line on lent by other scripts
_TAG = re.compile("[\U000e0000-\U000e007f]+")  # invisible copies of ASCII
_SELECTOR = re.compile("[\U000e0100-\U000e01ef]+")  # variation selectors 17 to 256, which can carry the bytes 16 to 255
_BLANKS = "\u2800\u3164\uffa0"  # seen as a space; no white space to Unicode
# Unicode's default ignorables, less those above.
_UNSEEN = ("\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
           "\ufe00-\ufe0f\ufeff\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0080-\U000e00ff\U000e01f0-\U000e0fff")
_INVISIBLE = re.compile(f"[{_UNSEEN}{_BLANKS}]+")
_IS_BLANK = re.compile(f"[{_BLANKS}]").search
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufff9-\ufffb]+")  # less white space: no script needs these
_BIDI = re.compile("([\u202a-\u202e\u2066-\u2069\n\r\x85\u2028\u2029])")
_TURNS = re.compile(r"\u202e|&#(?:0{0,4000}8238|[xX]0{0,4000}202[eE])|%[eE]2%80%[aA][eE]|\\u202[eE]")
_LINE_ENDS = set("\n\r\x85\u2028\u2029")
_OPENED_BY = {"\u202c": set("\u202a\u202b\u202d\u202e"), "\u2069": set("\u2066\u2067\u2068")}  # what each end closes
_MOST_LEVELS = 125  # of embedding; as in Unicode, deeper ones change nothing
_IS_LETTER = re.compile(f"[{_LETTER}]").match
_ENTITY = re.compile(r"&(?:#0{0,4000}[0-9]{1,7}|#[xX]0{0,4000}[0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});?")
_PERCENT = re.compile(r"%[0-9A-Fa-f]{2}")
_ESCAPES = re.compile(r"(?:\\u[0-9A-Fa-f]{4})+")  # of JSON and most languages; a run, as two of them can be one character
_BASE64 = re.compile(r"(?<![A-Za-z0-9+/_=-])[A-Za-z0-9+/_-]{16,}={0,2}(?![A-Za-z0-9+/_=-])")
_HEX = re.compile(r"(?<![0-9A-Za-z])(?:0x)?(?:[0-9A-Fa-f]{2}[ :]?){12,}(?![0-9A-Za-z])")
_MARKED = re.compile(f"[{_LETTER}][{_MARK}{_UNSEEN}]+")
_LONE_REGIONAL = re.compile("(?<![\U0001f1e6-\U0001f1ff])[\U0001f1e6-\U0001f1ff](?![\U0001f1e6-\U0001f1ff])")  # two are a flag
# Not "**S**mart" nor "a**b", not <br>, which parts words.
_BOLD_INSIDE = re.compile(r"(?<=[A-Za-z])(\*\*|~~)([A-Za-z]{1,20})\1")
_TAG_INSIDE = re.compile(r"(?<=[A-Za-z])(?:<!--[^>]{0,99}-->|</?(?:b|i|u|s|em|strong|span|font|small|mark|wbr)(?: [^<>]{0,99})?/?>)+(?=[A-Za-z])")
_ACCENTED = re.compile("[\u00c0-\u024f\u1e00-\u1eff]")
_ENGLISH = re.compile(r"\b(?:and|you|your|with|this|that|will|for|are|they|them|have|then|into|from|when|what|because|people|should|there)\b",
                      re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+")
_LOOKALIKES = str.maketrans(
    "аеорсухіјѕһԁԛԝӏвкмнтАВЕКМНОРСТУХІЈЅαορνιτυκγηρϲωΑΒΕΖΗΙΚΜΝΟΡΤΥΧı",
    "aeopcyxijshdqwlbkmhtABEKMHOPCTYXIJSaopvitukynpcwABEZHIKMNOPTYXi")
_SIGNS, _DOTS = r".\-_*|/,", "·•‧∙⋅~"
# One separator: another one parts words. Six letters where mathematics has a few.
_SPACED = re.compile(rf"(?<!\w)[A-Za-z](?:([ {_SIGNS}])[A-Za-z](?:\1[A-Za-z](?!\w)){{2,}}|([{_DOTS}+:=\t])[A-Za-z](?:\2[A-Za-z](?!\w)){{4,}})")
_SPELLED = tuple(re.compile(rf"(?<!\w)[A-Za-z]([{signs}])[A-Za-z](?!\w)(?:\1[A-Za-z](?!\w))*") for signs in (_SIGNS + _DOTS, " ", r"\n\t"))  # short words, too
_LONE_LETTER = re.compile(r"(?<!\w)[A-Za-z](?!\w)")
_LONE_RUN = re.compile(rf"(?<!\w)[A-Za-z](?:[ {_SIGNS}{_DOTS}]{{1,3}}[A-Za-z](?!\w)){{11,}}")
_BRACKETED = re.compile(r"(?<![\w)\]])(?:[(\[][A-Za-z][)\]] *){5,}")
_WIDE_GAP = re.compile(r"(?<=\S) {2,}(?=\S)")
_SEPARATOR = re.compile(rf"[ {_SIGNS}{_DOTS}+:=\n\t]")
_LEET = str.maketrans("4310578@$!", "aeiostbasi")
_LEET_WORD = re.compile(r"(?<![\w@$!])[A-Za-z0-9@$!]{2,}[A-Za-z0-9@$](?![\w@])")
_LEET_INSIDE = re.compile(r"[A-Za-z][0-9@$!]{1,2}[A-Za-z]|[0-9@$][A-Za-z]+[0-9@$!][A-Za-z]*")
# In a text that is full of it: any word with a letter, and "70" for "to".
_LEET_ANY = re.compile(r"(?<![\w@$!.])(?=[0-9@$!]*[A-Za-z]|[0-9]{2}(?!\w))[A-Za-z0-9@$!]*[A-Za-z0-9@$](?![\w@])")
_IS_DOMAIN = re.compile(r"[\w-]*\.\w").match
_CAPITAL_WORDS = re.compile(r"(?<![A-Za-z])(?:(?:[A-Z]+|[A-Z][a-z]|[A-Z]*[a-z]+[A-Z][A-Za-z]*)(?:[^A-Za-z]+|$)){8,}")
_ODD_SPACE = re.compile(r"[^\S \n\t\r]")
_GAP = re.compile(r"(?<=\S)[ \t]{3,}(?=\S)")


class _Plain(dict):
    """str.translate's table from compatibility forms of letters (full width, mathematical, circled) to plain ones."""

    def __missing__(self, code):
        return _plain_form(code)


@lru_cache(maxsize=4096)  # what a language needs, but not each of the million characters that hostile texts may hold
def _plain_form(code):
    char = chr(code)
    plain = unicodedata.normalize("NFKC", char)
    return plain if re.search("[A-Za-z]", plain) or unicodedata.category(char) == "Nd" and plain.isascii() else char


_PLAIN = _Plain({ord(char): char for char in "".join(map(chr, range(128))) + "™℠ªº№℃℉ℹ"} | {0x1F150 + i: chr(65 + i) for i in range(26)}
                | {0x1F170 + i: chr(65 + i) for i in range(26)}
                | str.maketrans("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ", "abcdefghijklmnoprstuvwyz"))


def normalised(text):
    """The text with disguises taken off: one pass of linear steps; the result is at most about twice as long.

    HTML entities, percent, JSON escapes, base64 and hex are decoded once. Control and invisible characters, text that an
    override shows from right to left, stacked marks, compatibility forms, lookalikes, markup inside words, letter spacing,
    leetspeak, odd white space and odd case are made plain. A message hidden in tag characters or variation selectors is put at the end.

    Args:
        text: str, well formed.
    Returns:
        str; equal to the text where there was nothing to take off.
    Example:
        normalised("b\\u200bl\\u200beach and v i n e g a r")  # 'bleach and vinegar'
    """
    text, hidden = _without_hidden(text)
    text = _ENTITY.sub(lambda match: html.unescape(match.group()), text)
    if len(_PERCENT.findall(text)) >= 3:
        text = unquote(text, errors="ignore")
    if sum(map(len, _ESCAPES.findall(text))) >= 18:  # three of them
        text = _ESCAPES.sub(_from_escapes, text)
    text = _CONTROL.sub("", text)
    if not text.isascii():
        text = _as_shown(text) if "\u202e" in text else text
        text = _LONE_REGIONAL.sub(lambda match: chr(ord(match.group()) - 0x1F1E6 + 65), text)
        text = _INVISIBLE.sub(_visible, text.translate(_PLAIN))
    text = _BASE64.sub(_from_base64, text)
    text = _HEX.sub(_from_hex, text)
    if not text.isascii():
        text = _MARKED.sub(_without_marks, text)
        text = _without_accents(text)
        text = _WORD.sub(_plain_word, text)
    text = _ODD_SPACE.sub(" ", text)
    text = _TAG_INSIDE.sub("", text)
    text = _BOLD_INSIDE.sub(r"\2", text)
    text = _without_spacing(text)
    text = _without_leet(text)
    text = _plain_case(text)
    text = _GAP.sub(" ", text)
    return text + "\n" + hidden if hidden else text


def turns(text):
    """Whether an override stands in the text, as it is or encoded: all that follows may be shown from right to left, however long it is."""
    return bool(_TURNS.search(text))


def _without_hidden(text):
    """(text without tag characters and high variation selectors, the printable text that they spell)."""
    if text.isascii():
        return text, ""
    tags = "".join(_TAG.findall(text))
    selectors = "".join(_SELECTOR.findall(text))
    if not tags and not selectors:
        return text, ""
    spelled = "".join(chr(ord(char) - 0xE0000) for char in tags)
    spelled += "\n" + bytes(ord(char) - 0xE0100 + 16 for char in selectors).decode("utf-8", "ignore")
    spelled = "".join(char for char in spelled if char.isprintable() or char == "\n").strip()
    return _SELECTOR.sub("", _TAG.sub("", text)), spelled


def _as_shown(text):
    """What overrides turn around, from left to right again, and then no bidi control; Hebrew and Arabic run the other way without one."""
    levels, n_deeper = [("", [])], 0  # levels: (what opened it, its pieces)

    def close():
        opener, pieces = levels.pop()
        levels[-1][1].append("".join(pieces[::-1] if opener == "\u202e" else pieces))
        return opener

    for part in _BIDI.split(text + "\n"):
        if any(part in openers for openers in _OPENED_BY.values()):
            if len(levels) <= _MOST_LEVELS:
                levels.append((part, []))
            else:
                n_deeper += 1
        elif part in _OPENED_BY and n_deeper:
            n_deeper -= 1
        elif part in _OPENED_BY:
            inner = levels[-1:] if part == "\u202c" else levels
            if any(opener in _OPENED_BY[part] for opener, _ in inner):
                while close() not in _OPENED_BY[part]:
                    pass
        else:
            while part in _LINE_ENDS and len(levels) > 1:
                close()
            is_turned = levels[-1][0] == "\u202e" and any(unicodedata.bidirectional(char) == "L" for char in part)
            levels[-1][1].append(part[::-1] if is_turned else part)
    shown = "".join(levels[0][1])[:-1]
    return text if shown == re.sub("[\u202a-\u202e\u2066-\u2069]", "", text) else shown


def _visible(match):
    """Invisible characters go where a Latin, Greek or Cyrillic letter stands beside them: other scripts and emoji need them."""
    start, end, text = match.start(), match.end(), match.string
    if start and _IS_LETTER(text, start - 1) or _IS_LETTER(text, end):
        return " " if _IS_BLANK(match.group()) else ""
    return match.group()


def _without_marks(match):
    """What composes to one letter stays that letter; stacked and struck-through ones are plain."""
    marked = _INVISIBLE.sub("", match.group())
    letter = unicodedata.normalize("NFC", marked[:3])
    return letter if len(letter) == 1 and len(marked) <= 3 else unicodedata.normalize("NFD", marked[0])[0]


def _without_accents(text):
    """Accents go where they are dense and English shows under them: "thé bléach thàt yòu" is no language that has them, "a café in Orléans" has two."""
    if not _is_dense([_ACCENTED.search(word) is not None for word in _WORD.findall(text)]):
        return text
    plain = _plain_letters(text)
    if len({word.lower() for word in _ENGLISH.findall(plain)}) < 2:
        return text
    # Danish has "for" and "have", too: one of them must have had an accent.
    return plain if any(_ACCENTED.search(word) and _ENGLISH.fullmatch(_plain_letters(word)) for word in _WORD.findall(text)) else text


def _plain_letters(text):
    return _ACCENTED.sub(lambda match: unicodedata.normalize("NFD", match.group())[0], text)


def _is_dense(marks, least=3, among=8):
    """Whether so many of neighbouring ones are set."""
    places = [i for i, mark in enumerate(marks) if mark]
    return any(last - first < among for first, last in zip(places, places[least - 1:]))


def _plain_word(match):
    """Lookalikes become Latin only in a word that mixes scripts: a Russian or Greek word stays as it is."""
    word = match.group()
    is_mixed = not word.isascii() and any("a" <= char.lower() <= "z" for char in word)
    return word.translate(_LOOKALIKES) if is_mixed else word


def _without_spacing(text):
    """Letter-spaced words are joined from four letters on; from two on, and gaps closed, in a text or a run where most letters stand alone."""
    text = _BRACKETED.sub(lambda match: re.sub(r"[()\[\]]", "", match.group()), text)
    text = _LONE_RUN.sub(lambda match: _without_short_spacing(match.group()), text)
    return _SPACED.sub(_joined, _without_short_spacing(text))


def _without_short_spacing(text):
    """Words of two or three letters joined, too, and gaps closed, if most letters stand alone."""
    is_spelled = False
    for pattern in _SPELLED:  # signs first: the space in "a b.i.g" parts words
        n_alone = len(_LONE_LETTER.findall(text))
        if n_alone < 8:
            break
        if n_alone * 2 > sum(map(str.isalpha, text)):
            text, is_spelled = pattern.sub(_joined, text), True
    return _WIDE_GAP.sub(" ", _SPACED.sub(_joined, text)) if is_spelled else text


def _joined(match):
    return _SEPARATOR.sub("", match.group())


def _without_leet(text):
    """Undo digits for letters; "20ml", "utf8", "covid19", "3rd" and addresses stay as they are, but not in a text that is full of it."""
    n_leet = sum(map(_is_leet, _LEET_WORD.finditer(text))) if _LEET_INSIDE.search(text) else 0  # the quick look: most texts have none
    is_full = n_leet >= 3 and n_leet * 6 > text.count(" ")
    pattern, undoes = (_LEET_ANY, lambda match: True) if is_full else (_LEET_WORD, _is_leet)
    return pattern.sub(lambda match: match.group().translate(_LEET) if undoes(match) else match.group(), text) if n_leet else text


def _is_leet(match):
    word = match.group()
    if "@" in word and _IS_DOMAIN(match.string, match.end()):
        return False
    return sum(map(str.isalpha, word)) * 2 >= len(word) and not word[-2:].isdigit() and bool(_LEET_INSIDE.search(word))


def _plain_case(text):
    """Lower case for a text in capitals or in AlTeRnAtInG case, or a run of words in it; acronyms, headings and signs are shorter."""
    return text.lower() if _is_odd_case(text) else _CAPITAL_WORDS.sub(_plain_run, text)


def _plain_run(match):
    run = match.group()
    return run.lower() if _is_odd_case(run) and len(_WORD.findall(run)) * 2 <= sum(map(str.isalpha, run)) else run


def _is_odd_case(text):
    upper = sum(map(str.isupper, text))
    if upper < 4:
        return False
    letters = upper + sum(map(str.islower, text))
    return letters >= 8 and (upper > 0.7 * letters or len(re.findall("[a-z][A-Z]", text)) > letters / 5)


def _from_escapes(match):
    return bytes.fromhex(match.group().replace("\\u", "")).decode("utf-16-be", "ignore")  # half a pair is no character


def _from_base64(match):
    run = match.group().rstrip("=")
    try:
        return _legible(base64.b64decode(run + "=" * (-len(run) % 4), altchars=None if "-" not in run and "_" not in run else b"-_"),
                        match.group())
    except binascii.Error:
        return match.group()


def _from_hex(match):
    return _legible(bytes.fromhex(match.group().removeprefix("0x").replace(":", " ")), match.group())


def _legible(data, run):
    """Decoded bytes as text, or the run: a long ordinary word is valid base64, too, and decodes to noise."""
    printable = sum(32 <= byte < 127 or byte in b"\t\n\r" for byte in data)
    return data.decode("utf-8", "ignore") if printable > 0.8 * len(data) else run
