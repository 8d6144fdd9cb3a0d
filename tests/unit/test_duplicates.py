"""Exact and near duplicates, and leaks: what is planted is found, and nothing else."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.conversation import Conversation, Message, Origin
from luthier.data.duplicates import (
    Duplicates,
    Leaks,
    NearDuplicates,
    common_shingles,
    fingerprint,
    fold,
    jaccard,
    shingles,
)

New = Callable[..., NearDuplicates]
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "rk", "st", "lo")]


@pytest.fixture
def new_search() -> Iterator[New]:
    with ExitStack() as stack:
        yield lambda *args: stack.enter_context(closing(NearDuplicates(*args)))


def talk(*turns: str, **more: object) -> Conversation:
    """user, assistant, user, …"""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(turns))
    return Conversation(messages, Origin("made", 1), **more)  # type: ignore[arg-type]


def prose(rng: random.Random, words: int) -> list[str]:
    return [rng.choice(WORDS) for _ in range(words)]


def planted(rng: random.Random, words: int, low: float, high: float) -> tuple[str, str]:
    """Two texts whose Jaccard similarity lies in [low, high): the second has some words anew, in a run or scattered."""
    while True:
        target = rng.uniform(low, high)
        first = prose(rng, words)
        changed = max(1, round(words * (1 - target) / (1 + target)))
        scattered = rng.sample(range(words), max(1, changed // 3))  # each lies in three shingles
        places = rng.choice([scattered, range(words - changed, words)])
        second = [rng.choice(WORDS) if i in places else word for i, word in enumerate(first)]
        a, b = " ".join(first), " ".join(second)
        if low <= jaccard(shingles(a), shingles(b)) < high:
            return a, b


# --- folding and fingerprints


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, world!", "hello world"),
        ("  a\n\nb\t c ", "a b c"),
        ("“Straße” — yes…", '"STRASSE" — yes'),
        ("ｆｕｌｌ　ｗｉｄｔｈ", "full width"),
        ("cafe\u0301", "caf\u00e9"),
        ("zero\u200bwidth", "zerowidth"),
        ("well-known", "well\u2011known"),
        ("你好，世界。", "你好 世界"),
    ],
)
def test_case_width_spacing_and_prose_punctuation_do_not_count(one: str, other: str) -> None:
    assert fold(one) == fold(other)
    assert fingerprint(talk(one, "a")) == fingerprint(talk(other, "A."))


@pytest.mark.parametrize(
    ("one", "other"),
    [("3 - 2", "3 + 2"), ("3/2", "3*2"), ("x < y", "x > y"), ("1.5", "15"), ("-5", "5"), ("$5", "5"),
     ("résumé", "resume"), ("C#", "C"), ("你好", "你们"), ("a_b", "a b")],
)  # fmt: skip
def test_signs_and_letters_count(one: str, other: str) -> None:
    assert fold(one) != fold(other)


@given(st.text())
def test_folding_twice_changes_nothing(text: str) -> None:
    assert fold(fold(text)) == fold(text)


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_fast_way_for_ascii_folds_like_the_slow_one(text: str) -> None:
    assert fold(text) == fold(text + "\u200b")  # one invisible character takes the slow way


def test_fingerprints_tell_turns_roles_and_tool_calls_apart() -> None:
    call = Conversation(
        (Message("user", "a"), Message("assistant", "", tool_calls=({"name": "f"},))), Origin("made", 1)
    )
    different = [talk("a", "b"), talk("b", "a"), talk("a b"), talk("a", "b", "a"), talk("a", ""), call]
    assert len({fingerprint(c) for c in different}) == len(different)
    assert all(len(fingerprint(c)) == 16 for c in different)


def test_fingerprints_and_shingles_are_the_same_in_every_process() -> None:
    program = (
        "from luthier.data.duplicates import *; from luthier.data.conversation import *;"
        "c = Conversation((Message('user', 'a b c d é'),), Origin('x', 1));"
        "print(fingerprint(c).hex(), shingles('a b c d é').tolist())"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout for _ in "12"
    ]
    assert outputs[0] == outputs[1] != ""


def test_exact_duplicates_name_the_first_row_of_their_kind() -> None:
    seen = Duplicates()
    rows = [talk("a", "b"), talk("c", "d"), talk("A!", "b"), talk("c", "d"), talk("e", "f"), talk("e", "f")]
    assert [seen.add(row) for row in rows] == [None, None, 0, 1, None, 4]


# --- shingles


@given(st.text(), st.text())
def test_jaccard_is_symmetric_between_zero_and_one_and_one_for_the_same_words(one: str, other: str) -> None:
    a, b = shingles(one), shingles(other)
    assert jaccard(a, b) == jaccard(b, a)
    assert 0 <= jaccard(a, b) <= 1
    assert jaccard(a, a) == (1 if len(a) else 0)
    assert a.dtype == np.uint32
    assert (np.diff(a.astype(np.int64)) > 0).all()


@given(
    st.lists(st.sampled_from(WORDS[:12]), min_size=3, max_size=40), st.lists(st.sampled_from(WORDS[:12]), min_size=3)
)
def test_jaccard_of_hashes_is_jaccard_of_word_triples(one: list[str], other: list[str]) -> None:
    a, b = (set(zip(w, w[1:], w[2:], strict=False)) for w in (one, other))
    assert jaccard(shingles(" ".join(one)), shingles(" ".join(other))) == pytest.approx(len(a & b) / len(a | b))


def test_texts_without_spaces_are_compared_by_characters() -> None:
    one, other = "今天天气很好我们一起去公园散步吧然后吃饭", "今天天气很好我们一起去公园跑步吧然后吃饭"
    assert 0.6 < jaccard(shingles(one), shingles(other)) < 1
    assert len(shingles(one)) == len(one) - 2


def test_very_short_texts_still_have_shingles() -> None:
    assert len(shingles("yes"))
    assert jaccard(shingles("yes"), shingles("no")) == 0
    assert not len(shingles("…"))


# --- near duplicates


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_near_duplicates_are_found(new_search: New, threshold: float) -> None:
    """Recall at least 0.98 from a tenth above the threshold on, among 150 planted pairs and as many strangers."""
    rng = random.Random(threshold)
    pairs = [planted(rng, rng.choice([60, 120, 250]), min(threshold + 0.1, 0.95), 1.0) for _ in range(150)]
    near = new_search(threshold)
    for first, _ in pairs:
        near.add(talk(first))
        near.add(talk(" ".join(prose(rng, 60))))
    found = [near.add(talk(second)) for _, second in pairs]
    assert sum(at == 2 * i for i, at in enumerate(found)) >= 0.98 * len(pairs)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_nothing_below_the_threshold_is_called_a_near_duplicate(new_search: New, threshold: float) -> None:
    rng = random.Random(1)
    near = new_search(threshold)
    rows: list[str] = []
    for _ in range(100):
        for text in planted(rng, 60, threshold - 0.25, threshold):
            at = near.add(talk(text))
            if at is not None:
                assert jaccard(shingles(text), shingles(rows[at])) >= threshold
            rows.append(text)


def test_the_row_number_counts_rows_that_were_dropped_or_empty_too(new_search: New) -> None:
    near, text = new_search(0.8), "one two three four five six seven"
    assert [near.add(talk(t)) for t in ("…", text, text, "something else altogether here", text)] == [
        None,
        None,
        1,
        None,
        1,
    ]


def test_tables_and_the_store_of_shingles_outgrow_their_first_size(
    new_search: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.data.duplicates._SPOOL", 1 << 12)
    rng = random.Random(2)
    near, texts = new_search(0.8), [" ".join(prose(rng, 20)) for _ in range(1100)]
    assert [near.add(talk(t)) for t in texts] == [None] * 1100
    assert [near.add(talk(t)) for t in texts] == list(range(1100))


def test_rows_that_share_its_tables_do_not_hide_a_row(new_search: New) -> None:
    rng = random.Random(9)
    first = prose(rng, 200)
    near = new_search(0.8)
    near.add(talk(" ".join(first)))
    for start in range(0, 176, 2):  # 0.77 alike: below the threshold, but in many of the same slots
        assert near.add(talk(" ".join(first[:start] + prose(rng, 24) + first[start + 24 :]))) is None
    assert near.add(talk(" ".join(first))) == 0


def test_a_long_system_message_makes_no_rows_alike(new_search: New) -> None:
    rng = random.Random(3)
    near, system = new_search(0.5), Message("system", " ".join(prose(rng, 500)))
    rows = [Conversation((system, *talk(" ".join(prose(rng, 8))).messages), Origin("made", i)) for i in range(20)]
    assert [near.add(row) for row in rows] == [None] * 20


def test_an_instruction_in_every_row_makes_no_rows_alike(new_search: New) -> None:
    rng = random.Random(4)
    instruction = " ".join(prose(rng, 200))
    rows = [talk(f"{instruction} {' '.join(prose(rng, 12))}") for _ in range(40)]
    plain, aware = new_search(0.7), new_search(0.7, common_shingles(rows))
    assert any(plain.add(row) is not None for row in rows)
    assert [aware.add(row) for row in rows] == [None] * 40
    assert aware.add(rows[3]) == 3


# --- leaks


def test_leaks_by_prompt_by_text_and_by_nearness_name_the_test_row() -> None:
    rng = random.Random(5)
    near, like = planted(rng, 80, 0.85, 1.0)
    tests = [
        talk("What is a lute?"),
        talk("Who?", references=("Ada", "Ada Lovelace")),
        Conversation((Message("document", "a long text about lutes and more"),), Origin("made", 3)),
        talk(near, references=("yes",)),
    ]
    leaks = Leaks(tests, 0.8)
    document = Conversation((Message("document", "A long text about lutes and more."),), Origin("made", 9))

    def found(conversation: Conversation) -> tuple[int, str] | None:
        leak = leaks.find(conversation)
        return (leak.row, leak.kind) if leak else None

    assert found(talk("what is a LUTE", "An instrument.")) == (0, "prompt")
    assert found(talk("Hi", "Hello", "Who?", "Ada")) is None
    assert found(talk("What is a lute?", "Wood.", "And a harp?", "Also wood.")) == (0, "prompt")
    assert found(talk("Who?", "Ada Lovelace")) == (1, "prompt")
    assert found(document) == (2, "text")
    assert found(talk(like, "an answer that is not in the test rows")) == (3, "near")
    assert found(talk("What is a harp?", "Another one.")) is None


def test_a_system_message_on_one_side_hides_no_leak() -> None:
    leaks = Leaks([talk("What is a lute?")])
    row = Conversation((Message("system", "Be kind."), *talk("What is a lute?", "Wood.").messages), Origin("made", 1))
    assert leaks.find(row) is not None


def test_no_near_leak_is_missed_and_none_is_invented() -> None:
    rng = random.Random(6)
    pairs = [planted(rng, 40, 0.6, 1.0) for _ in range(60)]
    leaks = Leaks([talk(a) for a, _ in pairs], 0.8)
    for _, text in pairs:
        similarities = [jaccard(shingles(a), shingles(text)) for a, _ in pairs]
        leak = leaks.find(talk(text, "an answer"))
        if max(similarities) >= 0.8:
            assert leak is not None
            assert (leak.row, leak.similarity) == (int(np.argmax(similarities)), pytest.approx(max(similarities)))
        else:
            assert leak is None


def test_an_instruction_in_every_test_row_is_no_leak() -> None:
    rng = random.Random(7)
    instruction = " ".join(prose(rng, 200))
    tests = [talk(f"{instruction} {' '.join(prose(rng, 12))}") for _ in range(40)]
    leaks = Leaks(tests, 0.8)
    assert leaks.find(talk(f"{instruction} {' '.join(prose(rng, 12))}", "x")) is None
    leak = leaks.find(talk(tests[5].messages[0].content + " indeed", "x"))
    assert leak is not None
    assert (leak.row, leak.kind) == (5, "near")


def test_without_test_rows_and_without_a_threshold_nothing_near_leaks() -> None:
    assert Leaks([]).find(talk("a", "b")) is None
    text = " ".join(prose(random.Random(8), 50))
    assert Leaks([talk(text)], None).find(talk(text + " more", "b")) is None
