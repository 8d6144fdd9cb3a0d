"""Personal data in running text, found by kind and replaced by typed placeholders such as [EMAIL].

Precision first: a year, a price, a version or a date that became [PHONE] would be taught to the model. So a number
counts only if something other than its length says what it is: a checksum (Luhn for cards, the issuer's own for
identity numbers), the grouping its country writes it in (phones), or the words before it ("my passport number is").

Phone numbers are judged by `phonenumbers` (Google's metadata), identity numbers by `python-stdnum`; both are imported
when the first candidate turns up.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from luthier.errors import RecipeError
from luthier.registry import Registry

Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]
Recogniser = Callable[[str], Sequence[Span]]

RECOGNISERS = Registry("names", {})

# A number never starts or ends inside a word, a path, a sum of money, a decimal or a longer run of dashes and dots.
_START = r"(?<![\w$€£¥%=/+])(?<![\w][.,:\-–/])(?<![$€£¥] )"
_END = r"(?![\w%€£¥])(?![.,:/\-–][\w])"
# The next speaker's answer, where the words before a number are the question: "?\nJo: Yes, it's ".
_REPLY = r"\?\s*\n[^\n:]{1,20}:[^\d\n]{0,24}"


def urls(text: str) -> Iterator[Span]:
    """Addresses with a scheme or `www.`, and bare domains under the commonest top-level domains."""
    for match in _URL.finditer(text):
        start, end = match.span()
        while text[end - 1] in ".,;:!?'*_" or (text[end - 1] in ")]}" and _unopened(text[start:end])):
            end -= 1  # punctuation of the sentence, not of the address
        yield start, end


_URL_END = r"[!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~\u00a1-\u1fff]"
_URL = re.compile(
    rf"(?i:(?<![a-z0-9])(?:https?|ftp|wss?)://|(?<![\w.@-])www\.(?=[\w-]+\.)){_URL_END}+"
    rf"|(?<![\w@./-])(?:[a-z0-9][a-z0-9-]*\.)+(?:com|org|net|edu|gov|info|(?:ac|co|gov|org)\.[a-z]{{2}})"
    rf"(?![\w-]|\.\w|\()(?:/{_URL_END}*)?"
)


def _unopened(address: str) -> bool:
    close = address[-1]
    return address.count(close) > address.count("([{"[")]}".index(close)])


def emails(text: str) -> Iterator[Span]:
    """local@domain.tld, but not `git@host:path` nor `icon@2x.png`."""
    return (m.span() for m in _EMAIL.finditer(text)) if "@" in text else iter(())


_LETTER = r"A-Za-z0-9\u00c0-\u024f\u0400-\u04ff"
_EMAIL = re.compile(
    rf"(?<![{_LETTER}._%+'-])[{_LETTER}_][{_LETTER}._%+'-]{{0,63}}@(?:[{_LETTER}](?:[{_LETTER}-]{{0,62}})\.){{1,8}}"
    r"(?!(?:png|jpe?g|gif|svg|webp|css|js|py)\b)[A-Za-z]{2,24}(?![\w-])(?!:[\w/])"
)


def addresses(text: str) -> Iterator[Span]:
    """IPv4 and IPv6 addresses, but not loopback or netmasks (they point at no one), nor versions and sections."""
    for match in _IP.finditer(text):
        if _is_ip(match.group()) and not (
            match["four"] and _NUMBERING.search(text[max(0, match.start() - 16) : match.start()])
        ):
            yield match.span()


_IP = re.compile(
    r"(?<![\w.:-])(?:(?P<four>(?:\d{1,3}\.){3}\d{1,3})(?![\w-]|\.\d)|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]|\.\d))"
)
_NUMBERING = re.compile(
    r"(?i)(?:\b(?:v|ver\.?|version|release|build|firmware|driver|section|sec\.|chapter|clause|§|table|figure|oid)|[=~^<>!]=|§)\s*$"
)


def _is_ip(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 6 and sum(map(bool, text.split(":"))) < 3:
        return False  # `1::2` is more often code than a host
    return not (address.is_loopback or address.is_unspecified or text.startswith("255.255."))


def cards(text: str) -> Iterator[Span]:
    """Payment cards: an issuer's prefix, its length, a card's grouping or none, and the Luhn digit."""
    for match in _CARD.finditer(text):
        digits = re.sub("[ -]", "", match.group())
        if _ISSUER.fullmatch(digits) and _is_valid("luhn", digits):
            yield match.span()


_CARD = re.compile(
    rf"{_START}(?:\d{{14,19}}|(?:\d{{4}}(?P<s>[ -])\d{{4}}(?P=s)\d{{4}}(?P=s)\d{{4}}(?:(?P=s)\d{{3}})?)"
    rf"|\d{{4}}(?P<t>[ -])\d{{6}}(?P=t)\d{{4,5}}){_END}"
)
_ISSUER = re.compile(  # Visa, Mastercard, American Express, Diners, Discover, JCB, UnionPay
    r"4\d{15}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)


def identities(text: str) -> Iterator[Span]:
    """Identity, tax and bank account numbers: by their country's format and checksum, or by the words before them."""
    if not _FIVE_DIGITS.search(text):
        return
    for module, pattern in _IDENTITIES:
        for match in pattern.finditer(text):
            if module is None or _is_valid(module, match.group()):
                yield match.span()
    for match in _NAMED_IDENTITY.finditer(text):
        yield match.span(1)


_FIVE_DIGITS = re.compile(r"\d{4}[A-Z]|\d(?:.{0,2}\d){4}")  # what all of them have, and few sentences
# Formats distinctive enough to be told apart in running text. None: the number has no check digit.
_IDENTITIES: list[tuple[str | None, re.Pattern[str]]] = [
    (module, re.compile(f"{_START}(?:{pattern}){_END}"))
    for module, pattern in [
        ("iban", r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?"),
        ("ar.cuit", r"\d{2}-\d{8}-\d"),
        ("be.nn", r"\d{2}\.\d{2}\.\d{2}-\d{3}\.\d{2}"),
        ("br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d{2}"),
        ("ch.ssn", r"756\.\d{4}\.\d{4}\.\d{2}"),
        ("cl.rut", r"\d{1,2}\.\d{3}\.\d{3}-[\dkK]"),
        ("cn.ric", r"\d{17}[\dXx]"),
        ("es.dni", r"\d{8}-?[A-Z]"),
        ("es.nie", r"[XYZ]-?\d{7}-?[A-Z]"),
        ("fi.hetu", r"\d{6}[-+A]\d{3}[0-9A-Y]"),
        ("fr.nir", r"[12] ?\d\d ?\d\d ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d"),
        (None, r"(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]"),  # gb
        ("in_.aadhaar", r"\d{4}[ -]\d{4}[ -]\d{4}"),
        ("in_.pan", r"[A-Z]{5}\d{4}[A-Z]"),
        ("it.codicefiscale", r"[A-Z]{6}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z]"),
        ("kr.rrn", r"\d{6}-\d{7}"),
        ("mx.curp", r"[A-Z]{4}\d{6}[HM][A-Z]{5}[0-9A-Z]\d"),
        ("no.fodselsnummer", r"\d{6} \d{5}"),
        ("se.personnummer", r"(?:\d\d)?\d{6}[-+]\d{4}"),
        ("us.itin", r"9\d\d-\d\d-\d{4}"),
        ("us.ssn", r"\d{3}-\d\d-\d{4}"),
    ]
]
_NAMED_IDENTITY = re.compile(
    r"(?i:\b(?:passport|ssn|social security|driv(?:er|ing)(?:['’]?s)? licen[cs]e|national (?:id|insurance)"
    r"|identity card|id card|tax(?:payer)? id|bsn|pesel|nhs|medicare|aadhaar|steuer-?id|codice fiscale"
    r"|(?:bank )?account (?=no|num|#)|(?:employee|patient|student|member(?:ship)?|customer) (?=id|no|num|#))"
    r"(?: ?(?:card|id|no\.?|num(?:ber)?|is|was|:|#|=)){0,4}"
    rf"(?:{_REPLY}| ?))"
    r"(?<![A-Za-z0-9])((?=(?:[A-Z -]*\d){5})[A-Z0-9]+(?:[ -]?[A-Z]*\d[A-Z0-9]*){0,6})(?![\w%]|[.,]\d)"
)


def phones(text: str) -> Iterator[Span]:
    """Phone numbers: international ones; national ones in the exact grouping of their country; and after a word such as
    "phone" or "call", anything of seven to fifteen digits that is not a date."""
    for match in _DIGITS.finditer(text):
        start, end = match.span()
        start += text[start] == "(" and ")" not in match.group()  # a bracket around the number, not in it
        if _CALLING.search(text[max(0, start - 80) : start]) and not _DATE.match(match.group()):
            yield start, end
        else:
            yield from ((start + s, start + e) for s, e in _grouped_phones(text[start:end]))


_DIGITS = re.compile(
    rf"{_START}(?:\+|\(\+?)?\d(?:[ .\-–/()]{{0,3}}\d){{6,14}}{_END}|(?<![\w+])\+\d(?:[ .\-()]{{0,3}}\d){{6,14}}"
)
_CALLING = re.compile(
    r"(?i)(?:\b(?:phone|telephone|tel|cell|mobile|mob|fax|call|dial|ring|text|sms|whatsapp|hotline|telefon|handy|móvil|teléfono"
    r"|téléphone|celular|telefono)\b|电话|手机|電話)"
    rf"[^\d\n?]{{0,24}}(?:{_REPLY})?$"
)
_DATE = re.compile(
    r"\d{4}([-./ ])\d{1,2}\1\d{1,2}|\d{1,2}([-./ ])\d{1,2}\2\d{2,4}$|(?:19|20)\d\d ?[-–] ?(?:19|20)\d\d$"
)
_BARE = re.compile(r"\d+(?:\.\d+)?")
# Countries whose groupings are narrow enough to tell a phone number from other numbers.
_COUNTRIES = ("US", "GB", "FR", "AU", "BR", "CN", "IN", "JP", "KR", "MX", "RU")


def _grouped_phones(candidate: str) -> Iterator[Span]:
    from phonenumbers import Leniency, PhoneNumberMatcher

    if _BARE.fullmatch(candidate):
        return  # may be anything
    for country in _COUNTRIES:
        found = list(PhoneNumberMatcher(candidate, country, leniency=Leniency.STRICT_GROUPING))
        if found:
            yield from ((match.start, match.end) for match in found)
            return


@cache
def _checker(module: str) -> Any:
    return import_module(f"stdnum.{module}").is_valid


def _is_valid(module: str, number: str) -> bool:
    return bool(_checker(module)(number))


# Where two kinds claim the same characters, the one named first has them.
FINDERS: dict[str, Finder] = {
    "url": urls,
    "email": emails,
    "ip": addresses,
    "card": cards,
    "id": identities,
    "phone": phones,
}


class Redactor:
    """Replaces personal data of the given kinds, and names where a recogniser finds them.

    Args:
        kinds: names of `FINDERS`.
        names: `module:attribute` of a function text -> list of (start, end).

    Raises RecipeError if the recogniser cannot be loaded, or gives back a place outside the text.
    """

    def __init__(self, kinds: Sequence[str], names: str | None = None) -> None:
        self._finders: dict[str, Finder] = {kind: FINDERS[kind] for kind in FINDERS if kind in kinds}
        if names:
            self._finders["name"] = _checked(RECOGNISERS.get(names), names)

    def __call__(self, text: str, counts: Counter[str]) -> str:
        """`text` with placeholders; adds to `counts` how many of each kind."""
        taken: list[tuple[int, int, str]] = []
        for kind, finder in self._finders.items():
            free = [(start, end, kind) for start, end in finder(text) if not _overlaps(start, end, taken)]
            taken += _apart(free)
        if not taken:
            return text
        counts.update(kind for *_, kind in taken)
        return _replaced(text, sorted(taken))


def _checked(recogniser: Recogniser, name: str) -> Finder:
    def finder(text: str) -> Iterator[Span]:
        for start, end in recogniser(text):
            if not 0 <= start < end <= len(text):
                raise RecipeError(
                    f"data.clean.names: {name} gave back ({start}, {end}) for a text of {len(text)} characters",
                    fix="a recogniser gives back (start, end) places inside the text",
                )
            yield start, end

    return finder


def _overlaps(start: int, end: int, taken: list[tuple[int, int, str]]) -> bool:
    return any(start < other_end and other_start < end for other_start, other_end, _ in taken)


def _apart(spans: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Drops spans that overlap an earlier one (the longer of two that start together stays)."""
    kept: list[tuple[int, int, str]] = []
    for span in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not kept or span[0] >= kept[-1][1]:
            kept.append(span)
    return kept


def _replaced(text: str, spans: list[tuple[int, int, str]]) -> str:
    parts, at = [], 0
    for start, end, kind in spans:
        parts += [text[at:start], f"[{kind.upper()}]"]
        at = end
    return "".join([*parts, text[at:]])
