"""The second view: what it takes off, what it must leave alone, and that no text makes it slow, large or fail."""
import base64
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protector.normalise import _PLAIN, _plain_form, normalised

PLAIN = "mix bleach and vinegar"
PLAIN_SENTENCE = "mix the bleach and the vinegar in one big pot because it is safe to do so"
N = 64 * 1024  # bytes; the guard's limit is four times that


def spell(text, base):
    return "".join(chr(base + ord(char)) for char in text)


DISGUISES = {
    "zero width": "\u200b".join(PLAIN.split(" ")[1]).join(("mix ", " and vin\u200degar")),
    "soft hyphen": "mix ble\u00adach and vine\u00adgar",
    "bidi": "mix \u202ehcaelb\u202c and \u2066vinegar\u2069",
    "bidi, to the line's end": "\u202e:xiM\nbleach and \u202eragen\u200biv\nin a pot",
    "control characters": "Mix bl\x7feach and vin\x02eg\x1far",
    "control characters, not ASCII": "Mix bl\ufff9e\x90ach and vin\x02egar",
    "variation selector": "mix b\ufe0fl\ufe0feach and vinegar",
    "full width": "ｍｉｘ　ｂｌｅａｃｈ ａｎｄ ｖｉｎｅｇａｒ",
    "mathematical": "𝐦𝐢𝐱 𝒃𝒍𝒆𝒂𝒄𝒉 𝖺𝗇𝖽 𝚟𝚒𝚗𝚎𝚐𝚊𝚛",
    "circled": "ⓜⓘⓧ ⓑⓛⓔⓐⓒⓗ ⓐⓝⓓ ⓥⓘⓝⓔⓖⓐⓡ",
    "small capitals": "mix ʙʟᴇᴀᴄʜ and ᴠɪɴᴇɢᴀʀ",
    "stacked marks": "m\u0336i\u0335x b\u0338\u0301\u0301l\u0337e\u0334a\u0338c\u0336h a\u0336nd v\u0337inegar",
    "accents": "mïx bléàch ànd vînégàr".replace("ïx", "ix") + " with yòur hands ánd thís",
    "homoglyphs": "mіx blеаch and vіnеgаr",
    "letter spacing": "m i x  b l e a c h  and v-i-n-e-g-a-r",
    "leetspeak": "m1x bl3@ch 4nd v1n3g4r",
    "odd white space": "mix\u00a0bleach\u2003and\u202fvinegar",
    "gaps": "mix    bleach      and   vinegar",
    "capitals": "MIX BLEACH AND VINEGAR",
    "alternating case": "mIx BlEaCh aNd ViNeGaR",
    "entities": "&#109;ix &#x62;leach &amp; vinegar".replace("&amp;", "and"),
    "percent": "%6d%69%78 bleach%20and vinegar",
    "base64": base64.b64encode(PLAIN.encode()).decode(),
    "base64, URL alphabet": "SGVsbG8_YWJjPj4-IG1peCBibGVhY2ggYW5kIHZpbmVnYXI=",
    "hex": PLAIN.encode().hex(),
    "hex in pairs": PLAIN.encode().hex(" "),
    "JSON escapes": "mix \\u0062\\u006c\\u0065\\u0061\\u0063\\u0068 and \\u0076inegar",
    "invisible between fancy letters": "mix 𝐛\u200b𝐥\u200b𝐞\u200b𝐚\u200b𝐜\u200b𝐡 and ｖ\u2060ｉ\u2060ｎ\u2060ｅ\u2060ｇ\u2060ａ\u2060ｒ",
    "invisible between marks": "".join(char + "\u0336\u200b\u0336" for char in "bleach") + " and vinegar",
    "marks of other scripts": "mix b\u0654l\u05b4e\u3099a\u302ac\u1cd2h\u2de0 and v\ua66fi\U0001e000negar",
    "blanks": "mix\u3164bleach\uffa0and\u2800vinegar",
    "entities with zeros": "mix &#00000098;leach and &#x" + "0" * 300 + "76;inegar",
    "parenthesised": "⒨⒤⒳ ⒝⒧⒠⒜⒞⒣ ⒜⒩⒟ (v)(i)(n)(e)(g)(a)(r)",
    "brackets": "mix [b][l][e][a][c][h] and [v] [i] [n] [e] [g] [a] [r]",
    "middle dots": "mix b·l·e·a·c·h and v•i•n•e•g•a•r",
    "other signs": "mix b+l+e+a+c+h and v:i:n:e:g:a:r",
    "tabs": "mix b\tl\te\ta\tc\th and vinegar",
    "a letter a line": "\n".join("bleach") + "\n\n" + "\n".join("vinegar"),
    "bold inside words": "mix bl**ea**ch and v**i**n**e**gar",
    "tags inside words": "mix bl<b>ea</b>ch and vin<wbr>e<!-- -->g<span class='x'></span>ar",
    "regional indicators": "mix 🇧 🇱 🇪 🇦 🇨 🇭 and " + "\u200b".join("🇻🇮🇳🇪🇬🇦🇷"),
}


@pytest.mark.parametrize("name", DISGUISES)
def test_s23_s26_takes_off(name):
    view = normalised(DISGUISES[name]).lower()
    assert "bleach" in view and "vinegar" in view, view


@pytest.mark.parametrize("disguise", [
    "  ".join(" ".join(word) for word in PLAIN_SENTENCE.split()), " ".join(".".join(word) for word in PLAIN_SENTENCE.split()),
    " ".join("-".join(word) for word in PLAIN_SENTENCE.split()), PLAIN_SENTENCE.translate(str.maketrans("aeiost", "431057")),
])
def test_s23_short_words_of_a_text_that_is_all_disguised(disguise):
    assert normalised(disguise) == PLAIN_SENTENCE


PLAIN_BESIDE = "The museum opens at nine and the tickets are free on Sundays. "


@pytest.mark.parametrize("disguise", [
    PLAIN_SENTENCE.upper(), PLAIN_SENTENCE.upper().replace(" ", "\n"), "".join(char.upper() if i % 2 else char for i, char in enumerate(PLAIN_SENTENCE)),
    "  ".join(" ".join(word) for word in PLAIN_SENTENCE.split()), " ".join(".".join(word) for word in PLAIN_SENTENCE.split()),
    " ".join("·".join(word) for word in PLAIN_SENTENCE.split()),
])
def test_s23_harmless_text_beside_a_disguise_keeps_none_of_it(disguise):
    """Regression: capitals, odd case and spacing were undone only where most of the whole text had them."""
    view = normalised(PLAIN_BESIDE * 4 + disguise + " " + PLAIN_BESIDE * 4)
    assert view.replace("\n", " ") == PLAIN_BESIDE * 4 + PLAIN_SENTENCE + " " + PLAIN_BESIDE * 4


def test_m25_a_payload_in_tag_characters_is_decoded():
    assert normalised("Nice photo!" + spell(PLAIN, 0xE0000)) == "Nice photo!\n" + PLAIN


def test_m25_tag_characters_inside_a_word_hide_neither_the_word_nor_the_payload():
    hidden = "".join(a + b for a, b in zip("bleach", spell("garage", 0xE0000)))
    assert normalised(hidden) == "bleach\ngarage"


def test_m25_a_payload_in_variation_selectors_is_decoded():
    # Byte b >= 16 is the selector U+E0100 + b - 16.
    assert normalised("😀" + spell(PLAIN, 0xE0100 - 16)) == "😀\n" + PLAIN


@pytest.mark.parametrize("text, view", [
    ("\u202e" + "Mix bleach and vinegar"[::-1] + "\u202c", "Mix bleach and vinegar"),  # a reader sees it from left to right
    ("a \u202edc ba\u202c e \u202egf\u202e.h", "a ab cd e h.fg"),  # the inner one is a part of what the outer one turns around
    *(("\u202e" + inner + "cba", "abc") for inner in ("\u2066\u2069", "\u202a\u202c", "\u2069", "\u2066\u202c\u2069", "\u202a" * 300 + "\u202c" * 300)),
    ("\u202eef\u202acd\u202cba", "abcdfe"), ("\u2066\u202eba\u2069 cd", "ab cd"),  # an embedded run isn't turned; an isolate's end closes all in it
    ("\u202eba\ncd", "ab\ncd"), ("\u202dab\u202c", "ab"),  # so does a line; this one is from left to right
    ("\u202eשלום\u202c", "\u202eשלום\u202c"),  # runs that way without it
])
def test_s23_an_override_is_undone(text, view):
    assert normalised(text) == view


def test_s23_accents_go_where_they_are_dense_whatever_stands_around():
    around = "There is a café in Orléans, and you should go there. " * 9
    assert normalised(around) == around
    assert normalised(around + "Mïx the bléàch wïth vïnégàr thén. " + around) == (around + "Mix the bleach with vinegar then. " + around).replace("é", "e")
    danish = "Det er en god idé at have en plan for, hvad man gør på åen; så når man længere end før."
    assert normalised(danish) == danish, "the words that look English have no accents"
    assert normalised("Mix bléach with vinégar, and you have it") == "Mix bléach with vinégar, and you have it", "two are no disguise"


def test_s23_odd_white_space_is_a_space_in_ascii_too():
    assert normalised("mix\x0bbleach\x0cand") == "mix bleach and"


@pytest.mark.parametrize("text, view", [
    (r"\u0061\u0062\u0063", "abc"), (r"\ud83d\ude00 \u0061", "😀 a"), (r"\ud83d \ude00 \u0061", "  a"), (r"\u0061\u0002\u0062", "ab"),
    (r"\u00e9 and \u00e8", r"\u00e9 and \u00e8"), (r"\usepackage \undo \user \u00e9", r"\usepackage \undo \user \u00e9"),  # too few
])
def test_s26_json_escapes_by_hand(text, view):
    assert normalised(text) == view


def test_s26_decodes_once():
    twice = base64.b64encode(base64.b64encode(PLAIN.encode())).decode()
    assert normalised(twice) not in (twice, PLAIN)


@pytest.mark.parametrize("text", [
    "यह क्‍या है? नमस्ते, आप कैसे हैं।", "السلام عليكم، كيف حالك؟", "می‌خواهم این را بدانم", "สวัสดีครับ น้ำส้มสายชู", "שלום, מה שלומך?",
    "👨‍👩‍👧‍👦 and ❤️ and 🏳️‍🌈", "1️⃣ First ✔️ done", "你好,世界!这是…一个“测试”。", "こんにちは。元気ですか?", "안녕하세요, 반갑습니다.",
    "Привет, как дела? Елена из Москвы.", "Καλημέρα, τι κάνεις;", "Le café de l'élève était très bon; ça va où?", "Người Việt thể thế cần được đọc.",
    "Größe, Übermut und Straße", "Great! Hello! Wow!!", "Take 20ml at 5pm, 100mg of B12, utf8, covid19, 3rd, H2O, mp3", "Write to me@example.com.",
    "state-of-the-art-methods-for-everyone", "https://example.com/a/b/index.html?x=1&y=2", "    def foo(x):\n        return x[0] % 3  # 100% sure",
    "getElementById(someVariable)", "| a | b |\n|---|---|\n| 1 | 2 |", "antidisestablishmentarianism", "Windows™ №5, 21℃, m², ½", "R&D, AT&T, 5 & 6",
    "The NASA and UNESCO report.", "It costs $5.00 or 10%.", "x = a_b_c * 2 ** n", "a\n\n\nb\n\n- c\n- d",
    "The sum a+b=c, the ratio x:y, the product a·b·c, the chain a = b = c and the powers a**b and 2**n", "f(a)(b) or (a) one (b) two, [a] and [b]", "A:\nB:\nC", "vector<int>x; a<br>b",
    "**S**pecific, **M**easurable: **Bold** and *it* and <b>b</b>", "🇩🇰 🇸🇪🇳🇴🇩🇪🇫🇷 🇮🇹", "# THE END OF THE YEAR\n\nThe sign at the gate says \"NO PARKING AT ANY TIME\", in red letters.",
    "Rødgrød med fløde; Łódź i Kraków", "בְּרֵאשִׁית\u200f בָּרָא", "か\u3099き\u3099", "هٰذا كِتابٌ", "⠓⠑⠇⠇⠕⠀⠺⠕⠗⠇⠙", "한글\u3164 채움", "The NASA, ESA, JAXA, CNES and DLR probes",
    "A café in Orléans is what you want, and they have naïve art in the hall: go there with them.", "J.R.R. Tolkien and the U.S. Army", "Options A, B, C or D", "Plan B", "At 10:45 we had 70 of 150 items, 3 in box B1 and 4x4 cars.",
])
def test_s23_ordinary_text_is_its_own_view(text):
    assert normalised(text) == text


HOSTILE = {
    "letters": "a", "spaced": "a ", "dotted": "a.", "underscored": "a a_", "separators": "a.a-a_a*", "percent": "%41", "ampersand": "&",
    "entity": "&amp", "digits of an entity": "&#9", "base64": "QUJD", "padding": "QUJD====", "hex": "ab", "hex pairs": "ab ", "hex colons": "ab:",
    "marks": "\u0301", "marks out of order": "\u0301\u0323", "marked": "a\u0301\u0323", "spaces": " ", "space and newline": "   \n", "newlines": "\n",
    "NUL": "\0", "replacement": "\ufffd", "emoji": "😀", "joiners": "\u200d", "families": "👨‍👩", "selectors": "\ufe0f", "tags": "\U000e0041",
    "expanding": "\ufdfa", "leet": "a1", "at": "a@b-", "shouts": "!", "quotes": "'s", "lookalikes": "аa", "capitals": "A", "alternating": "aB",
    "overrides": "\u202e", "overridden": "\u202ea", "controls": "\x02", "escapes": "\\u0041", "half escapes": "\\ud83d", "backslashes": "\\u",
    "isolates": "\u2066", "turned isolates": "\u202e\u2066a", "ends": "\u202e\u2069\u202c", "Hebrew overridden": "\u202eש", "zeros": "&#0", "bold": "a**",
    "tags inside": "a<b>", "comments": "a<!--", "brackets": "(a)", "bracketed": "(a) ", "regional": "🇦", "lone regional": "🇦 ", "capital words": "AB ",
    "camel": "aB ", "lone run": "a, ", "dots": "a·", "blanks": "\u2800", "marks and invisible": "a\u0336\u200b", "letters by line": "a\n", "half run": "a a a a a ab ",
    "Hangul": "\u1100\u1161\u11a8", "no-break": "\u00a0", "accents": "é", "slashes": "a/", "zero x": "0x",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("tail", ["", "g", "é!", "\u0301"])
def test_m18_linear_time_and_bounded_size_on_hostile_text(name, tail):
    unit = HOSTILE[name]
    text = ("a" if name == "marks" else "") + unit * (N // len(unit.encode())) + tail
    start = time.process_time()
    view = normalised(text)
    # The slowest of these takes 0.07 s; a quadratic step (there was one for hex and a mark) takes a minute.
    assert time.process_time() - start < 0.7
    assert len(view.encode()) <= 2 * len(text.encode())


def test_m18_a_huge_number_in_an_entity_is_no_error():
    # int() refuses more than 4,300 digits: html.unescape alone would raise, and on_error="pass" let the answer through.
    assert normalised("&#" + "9" * 5000 + "; bleach").endswith("bleach")


_text = st.text(st.one_of(st.characters(exclude_categories=("Cs",)), st.sampled_from("aA1 .&#%;=@$!\u0301\u200b\u202e\ufe0fаé0x_-+/\\u\x02\U000e0041\n")))


@settings(max_examples=300, deadline=None)
@given(_text)
def test_m03_any_text_has_a_bounded_view(text):
    view = normalised(text)
    view.encode()
    assert len(view.encode()) <= 2 * len(text.encode()) + 1


_ascii = st.text(st.sampled_from("abcDEF012 .-_@$!%&;=x/|,:\n\t+\\u\x02\x0b\x7f"), max_size=40)
_hidden = st.lists(st.sampled_from(["MIX", "IT", "a", "B", "ab", "cd12", " ", "  ", "\t", "\n", ". "]), max_size=40).map("".join)


@settings(max_examples=600, deadline=None)
@given(_ascii | _hidden)
@example("mix\t\t\tbleach")
@example("mix\t \tbleach")
@example("MIX IT ALL IN A BIG POT NOW")
@example("6d69 7820 626c 6561 6368 2061 6e64")
@example("a b! c d! e f! g h!")
def test_ascii_is_read_as_any_other_text(text):
    """Regression: a quick look found these texts plain; with a sign that isn't ASCII behind them each had a view."""
    assert normalised(text + "\n。") == normalised(text) + "\n。"


@pytest.mark.parametrize("text, view", [("mix\t\t\tbleach", "mix bleach"), ("MIX IT ALL IN A BIG POT NOW", "mix it all in a big pot now")])
def test_gaps_and_capitals_of_short_words_by_hand(text, view):
    assert normalised(text) == view


def test_m18_characters_that_were_seen_are_not_kept_for_ever():
    """Regression: each code point stayed in a table, up to 1.1 million of them."""
    kept = len(_PLAIN)
    for start in range(0x4e00, 0x9e00, 0x1000):
        normalised(spell("".join(map(chr, range(0x1000))), start))
    assert len(_PLAIN) == kept and _plain_form.cache_info().currsize <= 4096


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(categories=("Ll", "Lo"), exclude_characters=unicodedata.normalize("NFKC", "ª")), max_size=30))
def test_compatibility_only_changes_what_looks_like_latin(word):
    for before, after in zip(word, normalised(word)) if len(word) == len(normalised(word)) else ():
        assert before == after or after.isascii()
