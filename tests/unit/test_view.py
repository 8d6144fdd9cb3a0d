"""What people see of the data: true, harmless, and readable on narrow screens."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from luthier.data import view
from luthier.data.conversation import Example, Origin
from luthier.data.tokens import Tokenizer

EVIL = "<script>alert(1)</script>\x1b[2J\u202eevil & 'quoted'"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes as tokens (GPT-2's alphabet), and two control tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    added = [
        {"id": 256 + i, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, name in enumerate(["<|start|>", "<|end|>"])
    ]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    return Tokenizer({"added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model})


def example(tokenizer: Tokenizer, *parts: tuple[str, bool]) -> Example:
    """Each text with whether it is learned; `<|…|>` are control tokens."""
    ids: list[int] = []
    supervised: list[int] = []
    for text, learned in parts:
        control = tokenizer.control.get(text)
        new = [control] if control is not None else tokenizer.encode([text])[0][0]
        ids += new
        supervised += [int(learned)] * len(new)
    return Example(ids, supervised, 1, Origin("rows.jsonl", 3))


@pytest.fixture
def row(tokenizer: Tokenizer) -> Example:
    return example(
        tokenizer,
        ("<|start|>", False),
        ("What is a\nlute? 😀", False),
        ("<|end|>", False),
        (" Wood – mostly.", True),
        ("<|end|>", True),
    )


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "rows": {"read": 1200, "kept": 1100, "dropped": {"bad_row": 60, "leak": 40, "unheard_of": 7}, "cut": 5},
        "tokens": {"total": 200_000, "supervised": 30_000, "cut": 123},
        "supervised_share": 0.15,
        "duplicates": {"exact": 3, "near": 4},
        "leaks": {"exact": 40, "near": 0},
        "lengths": {
            "min": 10, "mean": 180.5, "median": 170.0, "p90": 300.0, "p99": 400.0, "max": 512,
            "histogram": {"edges": [10.0 + 25.1 * i for i in range(21)], "counts": [1, 0, 900, *range(17)]},
        },
        "train": {"rows": 1000, "tokens": 180_000},
        "heldout": {"rows": 100, "examples": 100, "tokens": 20_000},
        "test": {"read": 51, "rows": 50, "answered": 49, "dropped": {"bad_row": 1}},
        "cleaned": {"control": 9, "email": 2},
        "files": [
            {"path": "a/very/long/path/that/does/not/fit/into/forty/columns/train.jsonl", "part": "train", "rows": 1200,
             "format": "summary", "columns": {"document": "dialogue", "summary": ["s1", "s2"]}, "weight": 2.0,
             "sha256": "0" * 64},
            {"path": "empty.jsonl", "part": "test", "rows": 0, "weight": 1.0, "sha256": "0" * 64},
        ],
    }  # fmt: skip


def printed(shown: Any, width: int = 100, **options: Any) -> str:
    out = StringIO()
    Console(file=out, width=width, **options).print(shown)
    return out.getvalue()


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


# --- values


def test_the_pieces_joined_are_the_decoded_row_and_their_flags_are_the_masks(
    row: Example, tokenizer: Tokenizer
) -> None:
    found = view.pieces(row, tokenizer)
    assert "".join(p.text for p in found) == tokenizer.decode(row.ids, control=True)
    assert found == [
        ("<|start|>", False, True),
        ("What is a\nlute? 😀", False, False),
        ("<|end|>", False, True),
        (" Wood – mostly.", True, False),
        ("<|end|>", True, True),
    ]


def test_spaces_stay_where_a_tokenizer_drops_them_from_the_first_word() -> None:
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    model = {"type": "WordLevel", "vocab": {"▁a": 0, "▁b": 1, "?": 2}, "unk_token": "?"}
    words = Tokenizer({"added_tokens": [], "pre_tokenizer": space, "decoder": space, "model": model})
    assert [p.text for p in view.pieces(Example([0, 1], [0, 1], 1, Origin("f", 1)), words)] == ["a", " b"]


def test_a_mask_that_cuts_a_character_in_two_still_shows_every_piece(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["a😀b"])[0][0]
    found = view.pieces(Example(ids, [0, 0, 0, 1, 1, 1], 1, Origin("f", 1)), tokenizer)
    assert [p.supervised for p in found] == [False, True]
    assert found[0].text.startswith("a")
    assert found[1].text.endswith("b")


def test_an_empty_row_has_no_pieces(tokenizer: Tokenizer) -> None:
    nothing = Example([], [], 0, Origin("f", 1))
    assert view.pieces(nothing, tokenizer) == []
    assert "0 tokens" in printed(view.render_mask(nothing, tokenizer))


def test_every_count_of_the_report_is_shown(report: dict[str, Any]) -> None:
    shown = "\n".join(f"{name}: {value}" for section in view.sections(report) for name, value in section.facts)
    for fact in ("read: 1,200", "kept: 1,100", "dropped: 100", "shortened: 5", "could not be read: 60", "unheard_of: 7",
                 "in the test rows: 40", "in all: 200,000", "learned: 30,000 (15%)", "cut off: 123", "[EMAIL]: 2",
                 "control characters removed: 9", "3 exactly, 4 nearly", "40 exactly, 0 nearly", "each seen 2×",
                 "50 of 51 read, 49 with an answer", "empty.jsonl: test: 0 rows", "summary: s1 + s2"):  # fmt: skip
        assert fact in shown


def test_a_report_of_nothing_special_is_short(report: dict[str, Any]) -> None:
    plain = {"rows": {"read": 2, "kept": 2, "dropped": {}}, "tokens": {"total": 0, "supervised": 0}}
    assert [section.title for section in view.sections(plain)] == ["Rows", "Tokens"]
    assert "2 of 2 rows" in printed(view.render_report(plain))


# --- in a terminal


@pytest.mark.parametrize("width", [40, 60, 100])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(
    width: int, report: dict[str, Any], row: Example, tokenizer: Tokenizer
) -> None:
    text = printed(view.render_report(report), width) + printed(view.render_mask(row, tokenizer), width)
    assert max(map(len, text.splitlines())) <= width
    for section in view.sections(report):
        for name, _ in section.facts:
            assert all(squeezed(word) in squeezed(text) for word in name.split())


def test_bars_are_as_high_as_their_counts_and_never_hide_a_row() -> None:
    text = printed(view.Bars([0.0, 1.0, 2.0, 3.0, 4.0], [1000, 500, 1, 0]))
    assert [line.rstrip() for line in text.splitlines()[:4]] == ["  ██", "  ██", "  ████", "  ████▁▁"]
    assert "0" in text
    assert "4 tokens" in text


def test_learned_text_is_on_green_and_newlines_are_visible(row: Example, tokenizer: Tokenizer) -> None:
    text = printed(view.render_mask(row, tokenizer), force_terminal=True, color_system="standard")
    green = "".join(re.findall(r"\x1b\[[\d;]*42m([^\x1b]*)", text))
    assert squeezed(green) == "Wood–mostly.<|end|>"
    assert "a⏎" in text
    assert "rows.jsonl:3" in re.sub(r"\x1b\[[\d;]*m", "", text)


def test_without_colour_learned_text_is_in_brackets(row: Example, tokenizer: Tokenizer) -> None:
    assert "⟦ Wood – mostly.⟧⟦<|end|>⟧" in printed(view.render_mask(row, tokenizer))


def test_long_texts_are_shortened_in_the_middle_and_say_so(tokenizer: Tokenizer) -> None:
    long = example(tokenizer, ("begin " + "x" * 5000 + " end", True))
    text = squeezed(printed(view.render_mask(long, tokenizer)))
    assert len(text) < 1000
    assert "⟦begin" in text
    assert "end⟧" in text
    assert "4,310characters" in text


def test_a_terminal_never_gets_control_characters_from_the_data(report: dict[str, Any], tokenizer: Tokenizer) -> None:
    report["files"][0]["path"] = EVIL
    text = printed(view.render_report(report)) + printed(view.render_mask(example(tokenizer, (EVIL, True)), tokenizer))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "␛[2J" in text


# --- as a web page


class Page(HTMLParser):
    """Tags with attributes, texts, and text inside <mark>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.marked, self.open = "", "", [""]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1] == "mark" and "pre" in self.open:
            self.marked += data


def test_the_page_says_what_the_terminal_says_and_marks_what_is_learned(
    report: dict[str, Any], row: Example, tokenizer: Tokenizer
) -> None:
    page = Page(view.report_html(report, [row], tokenizer))
    for section in view.sections(report):
        assert section.title in page.text
        assert all(name in page.text and value in page.text for name, value in section.facts)
    assert page.marked == " Wood – mostly.<|end|>"
    assert "<|start|>What is a⏎\nlute? 😀<|end|>" in page.text
    assert sum(tag == "rect" for tag, _ in page.tags) == 20


def test_the_page_loads_nothing_and_runs_nothing(report: dict[str, Any], row: Example, tokenizer: Tokenizer) -> None:
    html = view.report_html(report, [row], tokenizer)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert not any(
        name in ("src", "href", "style") or name.startswith("on") for _, attrs in page.tags for name in attrs
    )
    assert not re.search(r"https?:|url\(|@import", html)
    assert "default-src 'none'" in html


def test_data_cannot_write_markup_into_the_page(report: dict[str, Any], tokenizer: Tokenizer) -> None:
    report["files"][0]["path"] = EVIL
    report["files"][0]["columns"] = {EVIL: EVIL}
    report["rows"]["dropped"][EVIL] = 1
    report["cleaned"][EVIL] = 1
    rows = [example(tokenizer, (EVIL, False), (EVIL, True))]
    rows.append(Example(rows[0].ids, rows[0].supervised, 1, Origin(EVIL, 1)))
    html = view.report_html(report, rows, tokenizer)
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script>␛[2J") >= 8
    assert "\u202e" not in html
