"""Answers and likelihoods of one side, kept as they come, so that a stopped comparison goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.conversation import Conversation, Example
from luthier.data.packing import micro_batches
from luthier.evaluate.metrics import Answer
from luthier.evaluate.subject import Side, Subject
from luthier.evaluate.suite import answerable, answered, digest, longest_first
from luthier.runs import Run

if TYPE_CHECKING:
    import torch

    from luthier.data.stream import Micro
    from luthier.model.generate import Sampling

Advance = Callable[[int], None]
"""Told how many more questions are done."""

CHUNK = 128
"""Prompts generated together before their answers are kept."""
PACK = 1024
"""Tokens of the rows whose likelihoods are taken in one pass: enough to keep a processor busy."""


class Memo:
    """Results by key, one JSON line each, appended as they come. A key says all that decides its result, so results of
    other settings do no harm, and the base's answers serve the next adapter too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        if kept != whole:  # the last line was torn by a crash; what follows must not be glued to it
            path.write_bytes(kept)
        self._results = {record["key"]: record for line in kept.splitlines() if (record := _record(line))}

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._results[key]

    def add(self, results: dict[str, dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for key, result in results.items():
                self._results[key] = {"key": key, **result}
                file.write(json.dumps(self._results[key]) + "\n")


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of a memo; None for one that a full disk or a hand has spoilt, whose result is then made again."""
    try:
        record: dict[str, Any] = json.loads(line)
        return record if isinstance(record, dict) and "key" in record else None
    except ValueError:
        return None


def answers(
    subject: Subject, side: Side, questions: Sequence[Conversation], sampling: Sampling, memo: Memo, advance: Advance
) -> list[Answer]:
    """One side's answer to each question, in their order; `text` is None where a question asks for none."""
    asked = [i for i, question in enumerate(questions) if answerable(question)]
    prompts = subject.encoder.prompts([questions[i] for i in asked])
    rule = {**subject.identity(side), **asdict(sampling), "stop": sorted(subject.encoder.stop_ids)}
    keys = [digest([rule, prompt]) for prompt in prompts]
    missing = [i for i in longest_first([len(p) for p in prompts]) if keys[i] not in memo]
    advance(len(questions) - len(missing))
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        memo.add(_generated(subject, side, {keys[i]: prompts[i] for i in chunk}, sampling, advance))
    found = {i: memo[key] for i, key in zip(asked, keys, strict=True)}
    return [_answer(found.get(i)) for i in range(len(questions))]


def _generated(
    subject: Subject, side: Side, prompts: dict[str, list[int]], sampling: Sampling, advance: Advance
) -> dict[str, dict[str, Any]]:
    from luthier.model.generate import generate

    asked, stops = list(prompts.values()), subject.encoder.stop_ids
    with subject.side(side):
        made = generate(subject.model, asked, sampling, stops, progress=lambda done, total: advance(1))
    return {
        key: {"text": subject.encoder.decode(one.ids), "stopped": one.stopped, "tokens": len(one.ids)}
        for key, one in zip(prompts, made, strict=True)
    }


def sampling_of(run: Run) -> Sampling:
    """The decoding that the recipe asks for."""
    from luthier.model.generate import Sampling

    wanted = run.recipe.evaluate.generate
    return Sampling(
        max_new_tokens=wanted.max_new_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        repetition_penalty=wanted.repetition_penalty,
        seed=run.recipe.train.seed,
    )


def _answer(found: dict[str, Any] | None) -> Answer:
    return Answer(found["text"], found["stopped"], found["tokens"]) if found else Answer()


def likelihoods(
    subject: Subject,
    side: Side,
    questions: Sequence[Conversation],
    given: Sequence[Answer],
    memo: Memo,
    advance: Advance,
) -> list[Answer]:
    """The answers in `given` with the likelihood of each question's first reference filled in, where there is one.

    Targets are the tokens that training would supervise, so exp(mean) is the perplexity of the held-out loss.
    """
    complete = {i: full for i, question in enumerate(questions) if (full := answered(question)) is not None}
    encoded = zip(complete, subject.encoder.examples(list(complete.values())), strict=True)
    examples = {i: example for i, example in encoded if any(example.supervised[1:])}
    keys = {i: digest(["likelihood", subject.identity(side), e.ids, e.supervised]) for i, e in examples.items()}
    missing = [i for i, key in keys.items() if key not in memo]
    advance(len(questions) - len(missing))
    for pack in micro_batches([len(examples[i].ids) for i in missing], PACK):
        rows = [missing[place] for place in pack]
        losses = _losses(subject, side, [examples[i] for i in rows])
        targets = [sum(examples[i].supervised[1:]) for i in rows]
        memo.add({keys[i]: {"nll": n, "targets": t} for i, n, t in zip(rows, losses, targets, strict=True)})
        advance(len(rows))
    filled = list(given)
    for i, key in keys.items():
        filled[i] = replace(filled[i], nll=memo[key]["nll"], targets=memo[key]["targets"])
    return filled


def _losses(subject: Subject, side: Side, examples: Sequence[Example]) -> list[float]:
    """Of each row the summed negative log-likelihood (nats) of its supervised tokens, the rows packed in one pass."""
    import torch

    from luthier.kernels.loss import linear_cross_entropy

    micro, counts = _packed(examples, subject.model.device), [sum(e.supervised[1:]) for e in examples]
    with subject.side(side):
        parts = zip(torch.split(subject.model.hidden(micro), counts), torch.split(micro.targets, counts), strict=True)
        return [float(linear_cross_entropy(hidden, subject.model.head, targets)) for hidden, targets in parts]


def _packed(examples: Sequence[Example], device: torch.device) -> Micro:
    import torch

    from luthier.data.stream import Micro

    lengths = [len(example.ids) for example in examples]
    ids = torch.tensor([i for example in examples for i in example.ids])
    learned = torch.tensor([bit for example in examples for bit in (0, *example.supervised[1:])]).nonzero()[:, 0]
    return Micro(
        ids=ids.to(device),
        positions=torch.cat([torch.arange(length) for length in lengths]).to(device),
        bounds=tuple(accumulate(lengths, initial=0)),
        rows=(learned - 1).to(device),
        targets=ids[learned].to(device),
        samples=torch.arange(len(examples), device=device),
        step=0,
    )
