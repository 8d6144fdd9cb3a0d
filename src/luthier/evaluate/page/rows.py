"""The questions and answers as the page shows them: every row for the page's script, and a few that need none."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

from markupsafe import Markup

from luthier.evaluate.metrics import Metric, shown
from luthier.evaluate.page.facts import known
from luthier.evaluate.statistics.paired import figure
from luthier.strict import dumps

Json = dict[str, Any]
SIDES = ("base", "tuned")
SHOWN = 3
"""Samples of each kind: largest gains, largest losses, random."""
LONG = 400
"""Characters from which a prompt is folded away."""
ROOM = 32_000_000
"""Characters of rows that one page holds: about 20,000 short dialogues, which a browser still opens in a second."""
CELLS = 1_000_000
"""Words of an answer times words of a reference up to which they are aligned; longer ones are left unmarked."""
TOKENS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\s+|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
"""Words and the white space between them; scripts that do not space their words come a character at a time."""


def read(path: Path, names: Sequence[str] = SIDES) -> list[Json]:
    """The rows of rows.jsonl in the page's shape: what belongs to a side is a list in the order of `names`. The
    first two of them are the row's base and tuned."""
    with open(path, encoding="utf-8") as lines:
        return [_row(json.loads(line), names[2:]) for line in lines]


def _row(row: Json, others: Sequence[str]) -> Json:
    more = [row["answers"][name] for name in others]
    return {
        "origin": row["origin"],
        "prompt": _prompt(row["prompt"]),
        "references": row["references"],
        "answers": [row[side] for side in SIDES] + more,
        "words": [row["words"][side] for side in SIDES] + [len((text or "").split()) for text in more],
        "stopped": [row["stopped"][side] for side in SIDES] + [None] * len(more),  # not known of the others
        "scores": {
            name: [score[side] for side in SIDES]
            for name, score in row["scores"].items()
            if all(known(score[side]) for side in SIDES)
        },
        "slices": row.get("slices", {}),
        "choices": _choices(row),
    }


def _prompt(messages: list[Json]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


def _choices(row: Json) -> list[tuple[str, list[int]]]:
    """Each choice with its share of the choices' likelihood on every side, in percent; empty where none was taken."""
    likelihoods = [row.get("choices_nll", {}).get(side) for side in SIDES]
    if not all(side and all(map(known, side)) for side in likelihoods):
        return []
    shares = [[exp(min(side) - nll) for nll in side] for side in likelihoods]
    percent = [[round(100 * share / sum(side)) for share in side] for side in shares]
    return list(zip(row["choices"], map(list, zip(*percent, strict=True)), strict=True))


# All rows, for the script.


def payload(rows: list[Json], metrics: dict[str, Json], names: Sequence[str]) -> Iterator[Markup]:
    """What the page's script reads, as JSON in pieces that no text in it can leave: `<` is written as its escape."""
    known = [shown(name, described) for name, described in metrics.items()]
    value = {
        "sides": names,
        "metrics": {metric.name: {"title": metric.title, "higher": metric.higher} for metric in known},
        "long": LONG,
        "cells": CELLS,
        "tokens": TOKENS.pattern,
    }
    yield _escaped(value)[:-1] + Markup(',"rows":[')
    for place, row in enumerate(rows):
        yield (Markup(",") if place else Markup("")) + _escaped(row)
    yield Markup("]}")


def _escaped(value: Json) -> Markup:
    return Markup(dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def fitting(rows: list[Json], room: int | None = None) -> list[Json]:
    """The rows that one page has room for, in file order: all of them, or a random draw. `room` is ROOM."""
    drawn, used, room = [], 0, room or ROOM
    for place in random.Random(0).sample(range(len(rows)), len(rows)):
        used += sum(
            map(len, (rows[place]["prompt"], *rows[place]["references"], *filter(None, rows[place]["answers"])))
        )
        if used > room:
            break
        drawn.append(place)
    return [rows[place] for place in sorted(drawn)]


def slice_values(rows: list[Json]) -> dict[str, list[str]]:
    """The values that rows have for each slice, in the order met."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, value in row["slices"].items():
            found.setdefault(name, {})[str(value)] = None
    return {name: list(values) for name, values in found.items()}


# A few, for a page without scripts and for paper.


def groups(rows: list[Json], name: str, metric: Metric, names: Sequence[str] = SIDES) -> list[Json]:
    """The largest gains, the largest losses and a random draw, no row twice."""
    gain = partial(_gain, name=name, metric=metric)
    ordered = sorted((row for row in rows if name in row["scores"]), key=gain, reverse=True)
    best = [row for row in ordered[:SHOWN] if gain(row) > 0]
    worst = [row for row in reversed(ordered[-SHOWN:]) if gain(row) < 0]
    taken = {id(row) for row in (*best, *worst)}
    rest = [row for row in ordered if id(row) not in taken]
    drawn = random.Random(0).sample(rest, min(SHOWN, len(rest)))
    kinds = (("Largest gains", best), ("Largest losses", worst), ("At random", drawn))
    return [
        {"title": title, "samples": [_sample(r, name, metric, names) for r in chosen]}
        for title, chosen in kinds
        if chosen
    ]


def _gain(row: Json, *, name: str, metric: Metric) -> float:
    base, tuned = row["scores"][name]
    return float(tuned - base) * (1 if metric.higher else -1)


def _sample(row: Json, name: str, metric: Metric, names: Sequence[str]) -> Json:
    base, tuned = row["scores"][name]
    return {
        **row,
        "change": f"{metric.title} {figure(base)} → {figure(tuned)}",
        "long": len(row["prompt"]) > LONG,
        "start": " ".join(row["prompt"][:160].split()) + " …",
        "sides": [_side(row, place, side) for place, side in enumerate(names) if row["answers"][place] is not None],
    }


def _side(row: Json, place: int, name: str) -> Json:
    count, ended = row["words"][place], row["stopped"][place]
    facts = f"{count} word{'' if count == 1 else 's'}" + (", cut off" if ended is False else "")
    return {
        "name": name,
        "style": "tuned" if place == 1 else "",
        "facts": facts,
        "parts": marked(row["answers"][place], row["references"]),
    }


def marked(text: str, references: Sequence[str]) -> list[tuple[str, bool]]:
    """The text in stretches, each with whether the nearest reference has its words in the same order. The page's script
    does the same for the rows it shows (`marked` in report.js); a test holds the two together."""
    said = TOKENS.findall(text)
    words = _words(text)
    aligned = [_shared(words, _words(reference)) for reference in references]
    if not aligned:
        return [(text, True)] if text else []
    nearest = iter(max(zip(aligned, references, strict=True), key=lambda pair: _closeness(*pair))[0])
    flags = [None if token.isspace() else next(nearest) for token in said]
    stretches: list[tuple[str, bool]] = []
    for place, token in enumerate(said):
        shared = _between(flags, place) if flags[place] is None else bool(flags[place])
        if stretches and stretches[-1][1] == shared:
            stretches[-1] = (stretches[-1][0] + token, shared)
        else:
            stretches.append((token, shared))
    return stretches


def _words(text: str) -> list[str]:
    """Words in lower case without outer punctuation; a word that is all punctuation stays as it is."""
    words = (token.lower() for token in TOKENS.findall(text) if not token.isspace())
    return [re.sub(r"^\W+|\W+$", "", word) or word for word in words]


def _shared(said: list[str], known: list[str]) -> list[bool]:
    """Which words of `said` lie on a longest common subsequence with `known`."""
    if len(said) * len(known) > CELLS:
        return [True] * len(said)
    best = [[0] * (len(known) + 1) for _ in range(len(said) + 1)]
    for i in reversed(range(len(said))):
        for j in reversed(range(len(known))):
            best[i][j] = best[i + 1][j + 1] + 1 if said[i] == known[j] else max(best[i + 1][j], best[i][j + 1])
    found, i, j = [False] * len(said), 0, 0
    while i < len(said) and j < len(known):
        if said[i] == known[j]:
            found[i], i, j = True, i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return found


def _closeness(shared: list[bool], reference: str) -> float:
    """Shared words as a share of both texts' words: Dice's coefficient."""
    return 2 * sum(shared) / max(1, len(shared) + len(_words(reference)))


def _between(flags: list[bool | None], place: int) -> bool:
    """White space is marked only between two marked words."""
    return not (0 < place < len(flags) - 1 and flags[place - 1] is False and flags[place + 1] is False)
