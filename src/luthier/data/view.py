"""What people see of the data: the report of `prepare`, and the mask of single rows, in a terminal and as a web page.

Values first (`pieces`, `sections`), then two ways to show them; both show exactly the same. Texts from data files are
made harmless on the way: escaped in HTML, and stripped of what a terminal or a browser would obey (`visible`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier.data.conversation import Example
from luthier.registry import counted

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
    from rich.text import Text

    from luthier.data.tokens import Tokenizer

_BARS = " ▁▂▃▄▅▆▇█"
_LONGEST = 700  # characters of one piece of a row that a terminal shows
_NEWLINE = "⏎\n"

_DROPPED = {
    "bad_row": "could not be read",
    "duplicate": "same text as an earlier row",
    "near_duplicate": "much like an earlier row",
    "leak": "in the test rows",
    "near_leak": "nearly in the test rows",
    "too_long": "longer than data.length",
    "unsupervised": "nothing to learn in it",
}
_CLEANED = {
    "control": "control characters removed",
    "unicode": "texts normalised",
    "mojibake": "texts with repaired encoding",
}


class Piece(NamedTuple):
    """A stretch of a row's text whose tokens all are, or all are not, learned; control tokens stand apart."""

    text: str
    supervised: bool
    control: bool


class Section(NamedTuple):
    """A part of the report: facts as (name, value)."""

    title: str
    facts: list[tuple[str, str]]


def pieces(example: Example, tokenizer: Tokenizer) -> list[Piece]:
    """The row as the model will see it, decoded from its ids, in order; joined, the texts are the whole decoding."""
    control = set(tokenizer.control.values())
    flags = [(bool(s), i in control) for i, s in zip(example.ids, example.supervised, strict=True)]
    found, start, before = [], 0, ""
    for (supervised, is_control), run in groupby(flags):
        end = start + len(list(run))
        # Decoded from the beginning: some tokenizers drop the space before the first word of what they decode.
        upto = tokenizer.decode(example.ids[:end], control=True)
        whole = upto.startswith(before)
        text = upto[len(before) :] if whole else tokenizer.decode(example.ids[start:end], control=True)
        found.append(Piece(text, supervised, is_control))
        start, before = end, upto
    return found


def visible(text: str) -> str:
    """`text` with control, format and bidirectional characters made visible, newline and tab kept."""
    return _HIDDEN.sub(lambda match: _picture(ord(match.group())), text)


_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def _picture(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else f"‹U+{code:04X}›"


def sections(report: dict[str, Any]) -> list[Section]:
    """The report in words. Sections with nothing to say are left out; what was dropped, cut or leaked never is."""
    parts = [
        Section("Rows", _rows(report)),
        Section("Tokens", _tokens(report)),
        Section("Dropped", [(_DROPPED.get(k, k), f"{n:,}") for k, n in report["rows"]["dropped"].items() if n]),
        Section(
            "Cleaned", [(_CLEANED.get(k, f"[{k.upper()}]"), f"{n:,}") for k, n in report.get("cleaned", {}).items()]
        ),
        Section("Files", [(str(file["path"]), _file(file)) for file in report.get("files", [])]),
    ]
    return [part for part in parts if part.facts]


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows, test = report["rows"], report.get("test", {})
    facts = [("read", f"{rows['read']:,}"), ("kept", f"{rows['kept']:,}")]
    facts.append(("dropped", f"{rows['read'] - rows['kept']:,}"))
    if rows.get("cut"):
        facts.append(("shortened", f"{rows['cut']:,}"))
    if report.get("heldout", {}).get("rows"):
        facts.append(("held out for the evaluation loss", f"{report['heldout']['rows']:,}"))
    if test.get("read"):
        facts.append(("test rows", f"{test['rows']:,} of {test['read']:,} read, {test['answered']:,} with an answer"))
    facts.append(("seen before", _exact_and_near(report.get("duplicates", {}))))
    facts.append(("found in test or held-out rows", _exact_and_near(report.get("leaks", {}))))
    return facts


def _exact_and_near(counts: dict[str, int]) -> str:
    exact, near = counts.get("exact", 0), counts.get("near", 0)
    return f"{exact:,} exactly, {near:,} nearly" if exact or near else "none"


def _tokens(report: dict[str, Any]) -> list[tuple[str, str]]:
    tokens, lengths = report["tokens"], report.get("lengths", {})
    facts = [
        ("in all", f"{tokens['total']:,}"),
        ("learned", f"{tokens['supervised']:,} ({_share(report):.0%})"),
        ("cut off", f"{tokens.get('cut', 0):,}"),
    ]
    if lengths:
        facts.append(("median row", f"{lengths['median']:,.0f}"))
        facts.append(("99th percentile", f"{lengths['p99']:,.0f}"))
        facts.append(("longest row", f"{lengths['max']:,.0f}"))
    return facts


def _share(report: dict[str, Any]) -> float:
    tokens = report["tokens"]
    return float(tokens["supervised"]) / tokens["total"] if tokens["total"] else 0.0


def shape(format: str | None, columns: Mapping[str, str | list[str]] | None) -> str:
    """A file's format and columns: `prompt-completion (prompt: question, completion: answer)`."""
    parts = (columns or {}).items()
    named = ", ".join(f"{part}: {of if isinstance(of, str) else ' + '.join(of)}" for part, of in parts)
    return (format or "") + (f" ({named})" if named else "")


def _file(file: dict[str, Any]) -> str:
    how = shape(file.get("format"), file.get("columns"))
    seen = f", each seen {file['weight']:g}×" if file.get("weight", 1) != 1 else ""
    return f"{file.get('part', '')}: {file['rows']:,} rows" + (f", {how}" if how else "") + seen


def sentence(report: dict[str, Any]) -> str:
    """The report in one sentence."""
    rows, tokens = report["rows"], report["tokens"]
    return (
        f"{rows['kept']:,} of {counted(rows['read'], 'row')} stay: {tokens['total']:,} tokens, "
        f"of which {tokens['supervised']:,} ({_share(report):.0%}) are learned."
    )


# --- in a terminal --------------------------------------------------------------------------------------------------


def render_report(report: dict[str, Any]) -> Group:
    """The report for `rich`: readable from 40 columns up."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = [Padding(Text(sentence(report), style="bold"), (1, 0))]
    for section in sections(report):
        parts += [Text(section.title, style="bold"), _facts(section), Text()]
        if section.title == "Tokens" and report.get("lengths", {}).get("histogram"):
            parts.append(Bars(**report["lengths"]["histogram"]))
    return Group(*parts)


def _facts(section: Section) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    names = [Text(visible(name), style="dim", overflow="fold") for name, _ in section.facts]
    values = [Text(visible(value), overflow="fold") for _, value in section.facts]
    if section.title == "Files":  # paths need the whole width
        lines: list[RenderableType] = []
        for name, value in zip(names, values, strict=True):
            lines += [name, Padding(value, (0, 0, 0, 2))]
        return Padding(Group(*lines), (0, 0, 0, 2))
    table = Table.grid(padding=(0, 2))
    for name, value in zip(names, values, strict=True):
        table.add_row(name, value)
    return Padding(table, (0, 0, 0, 2))


@dataclass(frozen=True)
class Bars:
    """A histogram of `counts` [n] between `edges` [n+1] for `rich`: block characters and an axis, one or two columns a
    bar. A bin that holds anything shows at least a line."""

    edges: Sequence[float]
    counts: Sequence[int]
    height: int = 4

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        wide = 2 if options.max_width >= 2 * len(self.counts) + 2 else 1
        tallest = max(self.counts, default=0) or 1
        eighths = [max(round(8 * self.height * count / tallest), min(count, 1)) for count in self.counts]
        for level in reversed(range(self.height)):
            yield Text("  " + "".join(_BARS[min(max(e - 8 * level, 0), 8)] * wide for e in eighths), no_wrap=True)
        low, high = f"{self.edges[0]:,.0f}", f"{self.edges[-1]:,.0f} tokens"
        yield Text(f"  {low}{high.rjust(max(wide * len(self.counts) - len(low), len(high) + 1))}\n", no_wrap=True)


@dataclass(frozen=True)
class Mask:
    """One row for `rich`: learned text on green, control tokens dim or bold; in brackets where there is no colour."""

    example: Example
    found: list[Piece]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.text import Text

        yield Text(_caption(self.example), style="bold")
        text = Text()
        for piece in self.found:
            _add(text, piece, colour=console.color_system is not None)
        yield Padding(text, (0, 0, 1, 2))


def render_mask(example: Example, tokenizer: Tokenizer) -> Mask:
    """What of a row is learned, to print with `rich`. Long stretches are shortened in the middle, and say so."""
    return Mask(example, pieces(example, tokenizer))


def _caption(example: Example) -> str:
    learned, total = sum(example.supervised), len(example.ids)
    return f"{visible(str(example.origin))} · {total:,} tokens, {learned:,} learned ({learned / max(total, 1):.0%})"


def _add(text: Text, piece: Piece, *, colour: bool) -> None:
    shown = visible(_shortened(piece.text)).replace("\n", _NEWLINE)
    if not colour:
        text.append(f"⟦{shown}⟧" if piece.supervised else shown)
        return
    weight = ("bold " if piece.supervised else "dim ") if piece.control else ""
    text.append(shown, style=f"{weight}black on green" if piece.supervised else weight.strip())


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


# --- as a web page --------------------------------------------------------------------------------------------------


def report_html(report: dict[str, Any], examples: Iterable[Example], tokenizer: Tokenizer) -> str:
    """The report and the masks of `examples` as one HTML file that loads nothing; light and dark, any width."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("luthier.data", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("view.html.jinja").render(
        sentence=sentence(report),
        sections=sections(report),
        histogram=_drawn(**report["lengths"]["histogram"]) if report.get("lengths", {}).get("histogram") else None,
        rows=[(_caption(example), pieces(example, tokenizer)) for example in examples],
        visible=visible,
        newline=_NEWLINE,
    )


def _drawn(edges: Sequence[float], counts: Sequence[int]) -> dict[str, Any]:
    """Bars in percent of the drawing: x, y, width, height; and the ends of both axes."""
    width, tallest = 100 / max(len(counts), 1), max(counts, default=0) or 1
    drawn = [
        (
            round(i * width, 2),
            round(100 - 100 * count / tallest, 2),
            round(0.9 * width, 2),
            round(100 * count / tallest, 2),
        )
        for i, count in enumerate(counts)
    ]
    return {"bars": drawn, "low": f"{edges[0]:,.0f}", "high": f"{edges[-1]:,.0f}", "tallest": f"{tallest:,}"}
