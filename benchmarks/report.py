"""The table and the plot of `gpu_step.py`, as Markdown and SVG.

    python benchmarks/report.py benchmarks/results/h200.jsonl [--run ID] [--svg docs/design/gpu-step.svg]

Only what was measured together is compared: of each workload and memory the newest run, which is a GPU and a day, in
which both luthier and a peer passed the gate of the first loss. What luthier did without a peer since is told apart,
and does not count. Figures are medians over rounds, with the least and the greatest; of a single round the spread is
that of its steps (10 % to 90 %), and a ratio has none. The first step is the earliest of the rounds: later ones have
files and kernels at hand. Of luthier the newest commit counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from peers.workloads import WORKLOADS

TITLES = {
    "transformers": "Trainer + PEFT",
    "trl": "TRL",
    "trl-off": "TRL, no checkpointing",
    "trl-liger": "TRL + Liger",
    "trl-liger-off": "TRL + Liger, no checkpointing",
    "unsloth": "Unsloth",
    "unsloth-off": "Unsloth, no checkpointing",
}
COLUMNS = (
    "workload | memory | peer | rounds | tok/s | spread | luthier ÷ peer | samples/s | of bound | "
    "reserved / allocated GiB | first step s | first loss"
)
START = "start"
# What is aimed at: tokens a second, or so many times what the best peer does; the first step after so many seconds.
AIMS = {("W1", "free"): 20_500, ("W1", "8GiB"): 14_300, ("W2", "free"): 18_000, ("W3", "free"): 19_000}
AIMS |= {("S1", "free"): 340_000, ("S1-8", "free"): 230_000}
TIMES = {("W1", "24GiB"): 1.3, ("W3-phi-3", "free"): 3.0, ("W3-glm-4", "free"): 3.0, ("W3-falcon-7b", "free"): 3.0}
START_AIM = 10.0


@dataclass(frozen=True)
class Entry:
    """A peer on a workload: its rounds, or why there are none."""

    peer: str
    rows: list[dict[str, Any]]
    failed: str = ""

    @property
    def ours(self) -> bool:
        return self.peer.partition(":")[0] == "luthier"

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row["parity"] for row in self.rows)

    @property
    def title(self) -> str:
        name, half, _ = self.peer.partition("-half")
        return TITLES.get(name, name) + (", half the rows at a time" if half else "")

    def median(self, key: str) -> float:
        return float(statistics.median(row[key] for row in self.rows))

    @property
    def first_step(self) -> float | None:
        """Seconds, where a row was measured in a process of its own."""
        return min((row["first_step_s"] for row in self.rows if "first_step_s" in row), default=None)

    @property
    def spread(self) -> tuple[float, float]:
        """Of tokens a second."""
        if len(self.rows) == 1:
            low, high = self.rows[0]["spread"]
            return low, high
        return min(row["tok_s"] for row in self.rows), max(row["tok_s"] for row in self.rows)


@dataclass(frozen=True)
class Group:
    """What was measured together: luthier as it comes, its variants, and its peers."""

    workload: str
    memory: str
    entries: list[Entry]
    alone: Entry | None = None  # luthier in a later run, without a peer

    @property
    def ours(self) -> Entry | None:
        return next((entry for entry in self.entries if entry.peer == "luthier" and entry.passed), None)

    @property
    def best(self) -> Entry | None:
        """The fastest of the peers."""
        peers = [entry for entry in self.entries if entry.passed and not entry.ours]
        return max(peers, key=lambda entry: entry.median("tok_s"), default=None)

    @property
    def compared(self) -> bool:
        return self.ours is not None and self.best is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--run", help="only what was measured in this run")
    parser.add_argument("--svg", type=Path, help="the plot is written here")
    options = parser.parse_args()
    rows = read(options.results, options.run)
    found = list(groups(rows))
    print(markdown(found, rows))
    if options.svg:
        shown = [group for group in found if group.compared and group.workload != START]
        options.svg.write_text(plot(shown), encoding="utf-8")


def read(path: Path, run: str | None) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    real = [row for row in rows if row.get("benchmark") == "gpu_step" and not row["dry"]]
    return [row for row in real if run in (None, row["run_id"])]


def groups(rows: list[dict[str, Any]]) -> Iterator[Group]:
    """Of each workload and memory the newest run that holds a comparison, else the newest."""
    order = list(WORKLOADS)
    kinds = {(row["workload"], row["memory"]) for row in rows}
    for workload, memory in sorted(kinds, key=lambda kind: (order.index(kind[0]), kind[1] != "free", kind[1])):
        here = [row for row in rows if (row["workload"], row["memory"]) == (workload, memory)]
        runs = [row["run_id"] for row in reversed(here)]
        found = [Group(workload, memory, entries(here, run)) for run in dict.fromkeys(runs)]
        newest = next((group for group in found if group.ours), None)
        compared = next((group for group in found if group.compared), None)
        if compared is None:
            yield replace(newest or found[0], alone=newest.ours if newest else None)
        else:
            yield replace(compared, alone=newest.ours if newest and newest is not compared else None)


def entries(rows: list[dict[str, Any]], run: str) -> list[Entry]:
    here = [row for row in rows if row["run_id"] == run]
    peers = dict.fromkeys(row["peer"] for row in here)
    return [entry(peer, [row for row in here if row["peer"] == peer]) for peer in peers]


def entry(peer: str, rows: list[dict[str, Any]]) -> Entry:
    """Of a round that was repeated the last one counts, of luthier the last commit."""
    if peer.partition(":")[0] == "luthier":
        rows = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    done = {row["round"]: row for row in rows if "failed" not in row}
    failed = rows[-1].get("failed", "").strip().splitlines()
    return Entry(peer, list(done.values()), failed[-1][:120] if failed and not done else "")


def markdown(found: list[Group], rows: list[dict[str, Any]]) -> str:
    steps, starts = ([group for group in found if (group.workload == START) == kind] for kind in (False, True))
    tables = [
        [facts(rows)],
        summary([group for group in steps if group.compared]),
        first_steps(starts),
        lone([group for group in steps if group.alone]),
        [*header(COLUMNS), *(line for group in found for line in table(group))],
    ]
    return "\n\n".join("\n".join(lines) for lines in tables if lines)


def header(names: str) -> list[str]:
    return [f"| {names} |", "|" + " --- |" * len(names.split(" | "))]


def facts(rows: list[dict[str, Any]]) -> str:
    rates = [row["rate_tflops"] for row in rows if "rate_tflops" in row]
    versions = rows[-1]["versions"] if rows else {}
    said = [
        *sorted({row["device"] for row in rows}),
        *sorted({f"driver {row['driver']}" for row in rows if row["driver"]}),
    ]
    said += [f"bf16 products at {min(rates):.0f} to {max(rates):.0f} TFLOP/s"] if rates else []
    return "; ".join([*said, ", ".join(f"{name} {number}" for name, number in versions.items())])


def summary(compared: list[Group]) -> list[str]:
    """A line a comparison. What failed or had a wrong loss is named: it might have been the best."""
    names = (
        "workload | memory | luthier tok/s | of bound | GiB | best peer | tok/s | GiB | ratio | aim | does not count"
    )
    lines = header(names)
    for group in compared:
        ours, best, out = group.ours, group.best, [entry.title for entry in group.entries if not entry.passed]
        if ours and best:
            cells = [group.workload, group.memory, f"{ours.median('tok_s'):,.0f}", f"{ours.median('bound_share'):.0%}"]
            cells += [f"{ours.median('peak_gib'):.1f}", best.title, f"{best.median('tok_s'):,.0f}"]
            cells += [f"{best.median('peak_gib'):.1f}", f"**{ratio(ours, best)}**", aim(group, ours, best)]
            lines.append(f"| {' | '.join(cells)} | {'; '.join(out)} |")
    return lines


def aim(group: Group, ours: Entry, best: Entry) -> str:
    """What was aimed at, and what it lacks."""
    key, reached = (group.workload, group.memory), ours.median("tok_s")
    wanted = AIMS.get(key) or TIMES.get(key, 0.0) * best.median("tok_s")
    said = f"{wanted:,.0f}" if key in AIMS else f"{TIMES.get(key, 0.0):g} times: {wanted:,.0f}"
    if not wanted:
        return ""
    return f"{said}, reached" if reached >= wanted else f"{said}, lacks {1 - reached / wanted:.1%}"


def first_steps(starts: list[Group]) -> list[str]:
    """From the beginning of a process to the end of its first step."""
    compared = [first_step(entry) for group in starts if group.compared for entry in group.entries if entry.passed]
    alone = [
        f"Start to the first step, without a peer in the same run, so not compared: {first_step(entry)} "
        f"({entry.rows[-1]['run_id']}, {entry.rows[-1]['commit']})."
        for group in starts
        if (entry := group.alone)
    ]
    return ([f"Start to the first step: {', '.join(compared)} (aim: {START_AIM:.0f} s)."] if compared else []) + alone


def first_step(entry: Entry) -> str:
    return f"{entry.title} {entry.first_step:.1f} s"


def lone(found: list[Group]) -> list[str]:
    """What luthier did with no peer beside it."""
    names = "without a peer in the same run, so not compared | memory | tok/s | spread | run | commit"
    lines = header(names) if found else []
    for group in found:
        if entry := group.alone:
            low, high, last = *entry.spread, entry.rows[-1]
            cells = [group.workload, group.memory, f"{entry.median('tok_s'):,.0f}", f"{low:,.0f} to {high:,.0f}"]
            lines.append(f"| {' | '.join([*cells, last['run_id'], last['commit']])} |")
    return lines


def ratio(ours: Entry, peer: Entry) -> str:
    """Of the medians; of several rounds each also the least and the greatest that the spreads leave."""
    said = f"{ours.median('tok_s') / peer.median('tok_s'):.2f}"
    if min(len(ours.rows), len(peer.rows)) == 1:
        return said
    low, high = ours.spread[0] / peer.spread[1], ours.spread[1] / peer.spread[0]
    return f"{said} ({low:.2f} to {high:.2f})"


def table(group: Group) -> Iterator[str]:
    for entry in group.entries:
        name = f"**{entry.title}**" if entry is group.best or entry.ours else entry.title
        cells = [entry.failed or "not measured", *[""] * 8]
        if entry.rows:
            cells = figures(entry, group.ours)
        yield f"| {group.workload} | {group.memory} | {name} | " + " | ".join(cells) + " |"


def figures(entry: Entry, ours: Entry | None) -> list[str]:
    low, high = entry.spread
    beside = ratio(ours, entry) if ours and entry.passed and entry is not ours else ""
    start = entry.first_step
    return [
        f"{len(entry.rows)}",
        f"{entry.median('tok_s'):,.0f}",
        f"{low:,.0f} to {high:,.0f}",
        beside,
        f"{entry.median('samples_s'):,.1f}",
        f"{entry.median('bound_share'):.1%}",
        f"{entry.median('peak_gib'):.1f} / {entry.median('peak_allocated_gib'):.1f}",
        "" if start is None else f"{start:.1f}",
        f"{entry.rows[0]['losses'][0]:.4f}" + ("" if entry.passed else " **wrong**"),
    ]


# ------------------------------------------------------------------------------------------------ the plot
LEFT, WIDTH, BAR, GAP, MARGIN = 300, 380, 18, 16, 54  # pixels
STYLE = """
text{font:12px sans-serif;fill:#222} .head{font-weight:bold} .axis{text-anchor:middle;fill:#555} .name{text-anchor:end}
.ours{fill:#b5541c} .peer{fill:#8a97a6} .grid{stroke:#ddd} .page{fill:#fff}
@media (prefers-color-scheme:dark){text{fill:#ddd} .axis{fill:#aaa} .ours{fill:#e07b39} .peer{fill:#6b7785}
.grid{stroke:#3a3f46} .page{fill:#16181c}}
"""


def plot(found: list[Group]) -> str:
    """Bars of the shares of the arithmetic bound, a block a workload; what failed the gate is left out."""
    parts, y = [text(LEFT, 18, "share of the arithmetic bound without recomputation", "head")], MARGIN
    for group in found:
        shown = [entry for entry in group.entries if entry.passed]
        parts.append(text(8, y + 13, heading(group), "head"))
        for place, entry in enumerate(shown):
            parts += bar(entry, y + BAR * (place + 1))
        y += BAR * (len(shown) + 1) + GAP
    grid = [line(share, y - GAP) for share in (0, 25, 50, 75, 100)]
    size = f'viewBox="0 0 {LEFT + WIDTH + 110} {y}" width="{LEFT + WIDTH + 110}" height="{y}"'
    said = "Share of the arithmetic bound that each peer reaches on each workload"
    body = "\n".join([f"<style>{STYLE}</style>", '<rect class="page" width="100%" height="100%"/>', *grid, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{said}">\n{body}\n</svg>\n'


def heading(group: Group) -> str:
    workload = WORKLOADS[group.workload]
    memory = "" if group.memory == "free" else f", at most {group.memory.replace('GiB', ' GiB')}"
    return f"{group.workload}: {workload.shape}{' in NF4' if workload.nf4 else ''}{memory}"


def bar(entry: Entry, y: int) -> list[str]:
    width = min(1.0, entry.median("bound_share")) * WIDTH
    kind = "ours" if entry.ours else "peer"
    return [
        text(LEFT - 8, y + 13, entry.title, "name"),
        f'<rect class="{kind}" x="{LEFT}" y="{y + 2}" width="{width:.1f}" height="{BAR - 4}"/>',
        text(LEFT + width + 6, y + 13, f"{entry.median('tok_s'):,.0f} tok/s", "value"),
    ]


def line(share: int, bottom: int) -> str:
    x = LEFT + WIDTH * share / 100
    drawn = f'<line class="grid" x1="{x}" x2="{x}" y1="{MARGIN - 8}" y2="{bottom}"/>'
    return drawn + text(x, MARGIN - 14, f"{share} %", "axis")


def text(x: float, y: float, said: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.0f}" y="{y}">{escape(said)}</text>'


if __name__ == "__main__":
    main()
