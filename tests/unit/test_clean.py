"""Cleaning changes what the recipe asks for, everywhere in a conversation, and counts it."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier import recipe
from luthier.data.clean import Cleaner
from luthier.data.conversation import Conversation, Message, Origin


def cleaned(text: str, **options: object) -> str:
    return Cleaner(recipe.Clean.model_validate(options)).text(text)


@pytest.mark.parametrize(
    "text",
    [
        "tab\tand newline\n",
        "👩‍👩‍👧 and 🏳️‍🌈 and ❤️‍🔥 and 👨🏽‍💻",  # joined emoji
        "می‌خواهم",  # Persian, with a zero-width non-joiner
        "क्‍ष and श्री",  # Devanagari, with a zero-width joiner
        "ශ්‍රී",  # Sinhala
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # the flag of England
        "שלום\u200f (עולם)",  # a right-to-left mark
        "葛\U000e0100",  # an ideograph's variant
        "na\u00efve \u2014 \u201cquotes\u201d\u2026 \u00a0 \ufffd",
    ],
)
def test_what_scripts_and_emoji_need_survives(text: str) -> None:
    assert cleaned(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\x00b\x07c\x1b[31md\x7f\x9b", "abc[31md"),
        ("a\r\nb\rc\x0bd\x0ce\x85f\u2028g\u2029h", "a\nb\nc\nd\ne\nf\ng\nh"),
        ("pass\u200bword, \ufeffstart, wo\u2060rd, soft\u00adhyphen", "password, start, word, softhyphen"),
        ("evil\u202etxt.exe\u202c \u2066x\u2069", "eviltxt.exe x"),
        ("la\u200ctin and la\u200dtin", "latin and latin"),
        ("left\u200eright\u200f", "leftright"),
        ("tag\U000e0068\U000e0069", "tag"),
        ("\ud800lone\udfff \ufdd0\uffff", "lone "),
    ],
)
def test_what_only_hides_or_reorders_text_is_removed(text: str, clean: str) -> None:
    assert cleaned(text) == clean
    assert cleaned(text, control=False, unicode="none") == text


def test_control_characters_are_counted_one_by_one() -> None:
    cleaner = Cleaner(recipe.Clean())
    cleaner.text("a\x00b\r\nc\u200b")
    assert cleaner.counts == {"control": 3}


@given(st.text(), st.sampled_from(["NFC", "NFKC"]))
def test_cleaning_twice_changes_nothing(text: str, form: str) -> None:
    once = cleaned(text, unicode=form)
    assert cleaned(once, unicode=form) == once
    assert unicodedata.is_normalized(form, once)  # type: ignore[arg-type]
    once.encode()


def test_unicode_forms_are_the_recipes_choice_and_counted() -> None:
    assert cleaned("cafe\u0301 ﬁ") == "café ﬁ"
    assert cleaned("cafe\u0301 ﬁ", unicode="NFKC") == "café fi"
    assert cleaned("cafe\u0301", unicode="none") == "cafe\u0301"
    cleaner = Cleaner(recipe.Clean())
    cleaner.text("cafe\u0301")
    cleaner.text("café")
    assert cleaner.counts == {"unicode": 1}


def test_mojibake_is_repaired_on_demand_and_good_text_is_left() -> None:
    assert cleaned("schÃ¶n â€œquotedâ€\x9d", mojibake=True) == "schön “quoted”"
    assert cleaned("schÃ¶n") == "schÃ¶n"
    assert cleaned("naïve “quotes” – 50 €", mojibake=True) == "naïve “quotes” – 50 €"


def test_every_text_of_a_conversation_is_cleaned_and_its_structure_kept() -> None:
    call = {"function": {"name": "mail", "arguments": {"to": ["a@b.io"], "n": 3, "urgent": None}}}
    conversation = Conversation(
        (
            Message("system", "s\x00"),
            Message("user", "u\x00", name="ada"),
            Message("assistant", "a@b.io", reasoning="r\x00", tool_calls=(call,)),
        ),
        Origin("made", 7),
        references=("a@b.io", "x\x00"),
        choices=("c\x00",),
        answer=0,
        meta={"kept": "\x00"},
    )
    clean = Cleaner(recipe.Clean(personal=["email"]))(conversation)
    assert [m.content for m in clean.messages] == ["s", "u", "[EMAIL]"]
    assert clean.messages[2].reasoning == "r"
    arguments = clean.messages[2].tool_calls[0]["function"]["arguments"]
    assert arguments == {"to": ["[EMAIL]"], "n": 3, "urgent": None}
    assert (clean.references, clean.choices, clean.answer) == (("[EMAIL]", "x"), ("c",), 0)
    assert (clean.origin, clean.meta, clean.messages[1].name) == (Origin("made", 7), {"kept": "\x00"}, "ada")


def test_a_text_that_stands_in_a_row_twice_counts_once_and_rows_add_up() -> None:
    row = Conversation(
        (Message("user", "hi"), Message("assistant", "a@b.io")), Origin("made", 1), references=("a@b.io",)
    )
    cleaner = Cleaner(recipe.Clean(personal=["email"]))
    cleaner(row)
    assert cleaner.counts == {"email": 1}
    cleaner(row)
    assert cleaner.counts == {"email": 2}


def test_a_character_that_hides_personal_data_is_removed_first() -> None:
    assert cleaned("ada@exam\u200bple.com", personal=["email"]) == "[EMAIL]"
    assert cleaned("ada＠example.com", personal=["email"], unicode="NFKC") == "[EMAIL]"
