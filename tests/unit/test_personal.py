"""What is personal data in running text, and what only looks like it."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.personal import FINDERS, Redactor
from luthier.errors import RecipeError

ALL = list(FINDERS)

# text with each piece of personal data in braces -> the kinds, in order
POSITIVES = [
    # e-mail
    ("write to {ada@example.com}", "email"),
    ("write to {ada.lovelace+news@mail.example.co.uk}.", "email"),
    ("<{o'hara_1@sub-domain.example.org}>", "email"),
    ("{a@b.io}, {c@d.ai}", "email email"),
    ("mailto:{ada@example.com}?subject=hi", "email"),
    ("E-Mail: {jürgen@müller.de}", "email"),
    ("邮箱{ada@example.com}。", "email"),
    ("ask {ADA@EXAMPLE.COM}: she knows", "email"),
    ('"{ada@example.com}"', "email"),
    # URLs
    ("see {https://example.com}", "url"),
    ("see {https://example.com/a/b?c=d&e=f#g}.", "url"),
    ("see ({https://en.wikipedia.org/wiki/Lute_(instrument)})", "url"),
    ("see [this]({http://example.com/x_1})", "url"),
    ("see {www.example.com/path}, please", "url"),
    ("see {HTTP://EXAMPLE.COM}!", "url"),
    ("{https://bob:secret@example.com:8080/login}", "url"),
    ("{ftp://files.example.com/pub}", "url"),
    ("visit {example.com} or {shop.example.co.uk/cart}", "url url"),
    ("siehe {https://de.wikipedia.org/wiki/Köln}", "url"),
    ("访问{https://example.com/a}查看", "url"),
    ("{https://192.168.0.1/admin}", "url"),
    # IP addresses
    ("host {192.168.1.10} is down", "ip"),
    ("from {8.8.8.8}:53", "ip"),
    ("{203.0.113.255}/24", "ip"),
    ("ping {2001:db8:85a3::8a2e:370:7334}", "ip"),
    ("ping {fe80::1ff:fe23:4567:890a}.", "ip"),
    ("[{2001:0db8:0000:0000:0000:ff00:0042:8329}]", "ip"),
    # cards
    ("card {4111 1111 1111 1111}", "card"),
    ("card {4111-1111-1111-1111}.", "card"),
    ("card {4111111111111111}", "card"),
    ("{5555555555554444} exp 10/27", "card"),
    ("{2223 0031 2200 3222}", "card"),
    ("amex {3782 822463 10005}", "card"),
    ("amex {378282246310005}", "card"),
    ("{6011 1111 1111 1117}", "card"),
    ("{3530-1113-3330-0000}", "card"),
    ("{30569309025904}", "card"),
    # identity numbers
    ("my number is {123-45-6789}", "id"),
    ("IBAN {DE89 3704 0044 0532 0130 00}", "id"),
    ("IBAN {GB82WEST12345698765432}", "id"),
    ("身份证 {11010519491231002X}", "id"),
    ("DNI {12345678Z}", "id"),
    ("NIE {X1234567L}", "id"),
    ("codice {RSSMRA85T10A562S}", "id"),
    ("CPF {390.533.447-05}", "id"),
    ("aadhaar {2341 2341 2346}", "id"),
    ("PAN {AAPPV8261K}", "id"),
    ("hetu {131052-308T}", "id"),
    ("NI {AB 12 34 56 C}", "id"),
    ("RRN {971013-9019902}", "id"),
    ("RUT {12.531.909-2}", "id"),
    ("SSN: {123456789}", "id"),
    ("my passport number is {X12345678}", "id"),
    ("Passport No. {C01X00T47}", "id"),
    ("driver's license: {D123-4567-8901}", "id"),
    ("bank account number {12345678}", "id"),
    ("account no. {00123 456789}", "id"),
    ("patient ID {A-1234567}", "id"),
    ("Your passport number?\n#Person2#: {Z3264356}", "id"),
    ("NHS number: {943 476 5919}", "id"),
    # phones
    ("{+1 415 555 2671}", "phone"),
    ("ring {+44 20 7946 0958}.", "phone"),
    ("{+49 30 901820}", "phone"),
    ("({+33 6 12 34 56 78})", "phone"),
    ("{+14155552671}", "phone"),
    ("{+86 138 0013 8000}", "phone"),
    ("it is {415-555-2671}", "phone"),
    ("it is {(415) 555-2671}, I think", "phone"),
    ("it is {415.555.2671}.", "phone"),
    ("{1-800-356-9377}", "phone"),
    ("{020 7946 0958}", "phone"),
    ("{06 12 34 56 78}", "phone"),
    ("{0412 345 678}", "phone"),
    ("{(11) 98765-4321}", "phone"),
    ("{138 0013 8000}", "phone"),
    ("{98765 43210}", "phone"),
    ("{03-1234-5678}", "phone"),
    ("{010-1234-5678}", "phone"),
    ("call me at {555-1234}", "phone"),
    ("my phone number is {4155552671}", "phone"),
    ("Tel.: {030 901820}", "phone"),
    ("What's your phone number?\n#Person2#: Yes. It's {0181 945 8719}.", "phone"),
    ("my telephone number is {367 - 1314}", "phone"),
    ("电话：{13800138000}", "phone"),
    ("WhatsApp {9876543210}!", "phone"),
    ("or {415-555-2671} or {415-555-2672}", "phone phone"),
]

NEGATIVES = [
    # dates, times, years
    "on 2024-01-15", "on 15/01/2024", "on 01.02.2023", "2024-01-15 10:30:00", "2024-01-15T10:30:00.123456Z",
    "between 1998-2001", "from 1939-1945 and 1914-1918", "in 1984", "at 10:30", "10:30-11:45", "12:30:45.123",
    "timestamp 1700000000", "at 1700000000000 ms", "20240115103000", "20240115", "call me on 2024-01-15",
    "phone me between 1998-2001", "9-11", "24/7", "the 1990s",
    # money, quantities, mathematics
    "it costs $1,234,567.89", "10.5", "€ 12 500 000", "$4111111111111111", "3.14159265358979", "0.4111111111111111",
    "5 000 000 000 people", "12 500 000", "1.000.000", "2-3-5-7-11-13", "1 2 3 4 5 6 7 8 9 10", "10 20 30 40 50",
    "100 200 300 400", "12 34 56 78 90", "0.5 0.25 0.125", "100-200-300", "1e-10", "= -0.3571428571", "= 0.9235687435",
    "the phone of 2019? No: 2,400,000", "15 + 20 = 35", "1234567 * 7654321",
    "-1234567890", "99.99%", "40.7128, -74.0060", "phones cost 1,299.99", "call 911", "call 10 people 20 times",
    "an account of 2500 dollars", "account balance 10000",
    # versions, sections, codes
    "version 1.2.3.4", "v10.0.19041.1", "Python 3.11.4", "firmware 10.0.0.12", "section 3.2.1.4", "§ 1.2.3.4",
    "numpy==1.26.4.1", "OID 1.3.6.1.4.1", "RFC 2616", "ISO 8601", "CVE-2021-44228", "doi 10.1038/nature12373",
    "arXiv 2301.12345", "ISBN 978-0-306-40615-7", "ISBN 9780306406157", "ZIP 94103-1234", "flight BA2490",
    "order 12345678", "sku 123-456-789", "a1b2c3d4e5f60718293a4b5c6d7e8f90", "550e8400-e29b-41d4-a716-446655440000",
    "00:1A:2B:3C:4D:5E", "NIST 800-171", "tweet 1234567890123456789", "ABCDE12345", "K 12 34", "12345678A",
    # invalid numbers
    "4111 1111 1111 1112", "4111111111111112", "1234 5678 9012 3456", "9999999999999995", "000-12-3456", "666-45-6789",
    "DE89 3704 0044 0532 0130 01", "256.1.1.1", "1.2.3", "1.2.3.4.5", "01.02.03.04", "127.0.0.1", "0.0.0.0", "::1",
    "255.255.255.0", "390.533.447-06", "11010519491231002Y",
    # words
    "std::vector<int>", "dead::beef", "a::b::c", "@ada wrote", "user@localhost", "git@github.com:ada/luthier.git",
    "icon@2x.png", "e.g. this", "i.e. that", "Node.js", "end.Then", "README.md", "main.py", "obj.method()",
    "x.com()", "http", "www", "a.b.c", "#Person1#: hello", "[EMAIL] and [PHONE]", "ask at the office", "ASP.NET",
    "passport photo", "social security office", "my passport is red", "customer service 24 hours",
]  # fmt: skip


def found(text: str, kinds: list[str] = ALL) -> tuple[str, Counter[str]]:
    counts: Counter[str] = Counter()
    return Redactor(kinds)(text, counts), counts


def expected(marked: str, kinds: str) -> str:
    out, kind = "", iter(kinds.split())
    for part in marked.replace("{", "\0{").replace("}", "\0").split("\0"):
        out += f"[{next(kind).upper()}]" if part.startswith("{") else part
    return out


@pytest.mark.parametrize(("marked", "kinds"), POSITIVES)
def test_personal_data_becomes_a_placeholder_of_its_kind_and_is_counted(marked: str, kinds: str) -> None:
    text, counts = found(marked.replace("{", "").replace("}", ""))
    assert text == expected(marked, kinds)
    assert counts == Counter(kinds.split())


@pytest.mark.parametrize("text", NEGATIVES)
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    for shown in (text, f"Well, {text}, he said.", f"({text})", f"{text}\n"):
        assert found(shown) == (shown, Counter())


def test_the_tables_are_long_enough_to_mean_something() -> None:
    assert len(POSITIVES) >= 60
    assert len(NEGATIVES) >= 60


def test_only_the_kinds_asked_for_are_replaced() -> None:
    text = "ada@example.com, +1 415 555 2671, 4111 1111 1111 1111"
    assert found(text, ["card"]) == ("ada@example.com, +1 415 555 2671, [CARD]", Counter(card=1))


def test_replacing_twice_changes_nothing_more() -> None:
    once, _ = found(" ; ".join(marked.replace("{", "").replace("}", "") for marked, _ in POSITIVES))
    assert found(once) == (once, Counter())


@given(st.text(alphabet="0123456789 .-+()/:@aAbZx\n,é中", max_size=80))
def test_any_text_is_handled_and_what_is_not_replaced_stays_as_it_was(text: str) -> None:
    redacted, counts = found(text)
    assert (redacted == text) == (not counts)


HOSTILE = ["1", "1 ", "a", "a.", "1-", "(", "https://", "A1 ", "a@", ":1", "call 1", "+1 ", "GB82 WEST "]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_texts_take_linear_time(piece: str) -> None:
    start = time.process_time()
    found(piece * (10_000 // len(piece)) + "@")
    assert time.process_time() - start < 10


def people(text: str) -> list[tuple[int, int]]:
    return [(at, at + 3) for at in range(len(text)) if text.startswith("Ada", at)]


def outside(text: str) -> list[tuple[int, int]]:
    return [(0, len(text) + 1)]


def test_names_are_found_by_the_recogniser_that_the_recipe_names() -> None:
    counts: Counter[str] = Counter()
    redact = Redactor(["email"], names=f"{__name__}:people")
    assert redact("Ada wrote: Ada@example.com", counts) == "[NAME] wrote: [EMAIL]"
    assert counts == Counter(email=1, name=1)


def test_an_installed_spacy_pipeline_finds_people_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spacy")
    pipeline = """
import spacy
def load():
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": "Ada Lovelace"}, {"label": "ORG", "pattern": "Acme"}])
    return nlp
"""
    (tmp_path / "en_people.py").write_text(pipeline)
    monkeypatch.syspath_prepend(tmp_path)
    text = "Then Ada Lovelace of Acme wrote to ada@example.com."
    redact = Redactor(["email"], names="luthier.data.names:en_people")
    assert redact(text, Counter()) == "Then [NAME] of Acme wrote to [EMAIL]."


def test_a_pipeline_that_is_not_installed_says_how_to_install_it() -> None:
    with pytest.raises(RecipeError, match="spacy download en_not_there"):
        Redactor([], names="luthier.data.names:en_not_there")


def test_a_recogniser_that_cannot_be_loaded_is_the_recipes_error() -> None:
    with pytest.raises(RecipeError, match="nowhere"):
        Redactor([], names="nowhere:people")


def test_a_recogniser_that_points_outside_the_text_is_named() -> None:
    with pytest.raises(RecipeError, match="outside"):
        Redactor([], names=f"{__name__}:outside")("Ada", Counter())
