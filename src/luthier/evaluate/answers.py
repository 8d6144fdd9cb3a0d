"""Answers and likelihoods of a subject: planned as tasks, done in any order by any process, and kept as they come.

A task's key says everything that decides its result. So a stopped comparison goes on where it was, results of other
settings do no harm, and the base's answers serve the next adapter too.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from luthier.data.conversation import Conversation, Example, Message
from luthier.data.packing import micro_batches
from luthier.evaluate.metrics import Answer
from luthier.evaluate.subject import SIDES, Side, Subject
from luthier.evaluate.suite import answerable, answered, digest
from luthier.runs import Run

if TYPE_CHECKING:
    import torch

    from luthier.data.stream import Micro
    from luthier.data.tokens import Encoder
    from luthier.model.generate import Sampling

Result = dict[str, Any]
Advance = Callable[[str, int], None]
"""Told of a label (`base answers`) and how many more of its tasks are done."""

CHUNK = 128
"""Prompts generated together before their answers are kept."""
PACK = 1024
"""Tokens of the rows whose likelihoods are taken in one pass: enough to keep a processor busy."""


@dataclass(frozen=True)
class Task:
    """One side's answer to a question's `prompt`, the likelihood of its `example`, or those of the `choices` that may
    follow its `prompt`."""

    side: Side
    question: int
    key: str
    prompt: list[int] | None = None
    example: Example | None = None
    choices: list[list[int]] | None = None

    @property
    def kind(self) -> Literal["answers", "likelihoods", "choices"]:
        return "likelihoods" if self.example else "choices" if self.choices else "answers"

    @property
    def label(self) -> str:
        return f"{self.side} {self.kind}"

    @property
    def length(self) -> int:
        """Tokens that are read."""
        return len(self.prompt or (self.example.ids if self.example else ()))


Rider = tuple[Task, list[list[int]]]
"""A task that asks for the likelihoods of what may follow a prompt, and the tokens of that."""


def plan(
    subject: Subject,
    questions: Sequence[Conversation],
    sampling: Sampling,
    *,
    sides: Sequence[Side] = SIDES,
    needs: Collection[str] = ("text",),
) -> list[Task]:
    """What has to be known of the questions: their answers (`text` in `needs`), the likelihood of their first
    references (`nll`) and of their choices (`choices`), on each side. A reference's targets are the tokens that
    training would supervise, so that exp(mean) is the perplexity of the held-out loss."""
    prompts = _prompts(subject, questions) if "text" in needs else {}
    examples = _examples(subject, questions) if "nll" in needs else {}
    choices = _choices(subject, questions) if "choices" in needs else {}
    tasks = []
    for side in sides:
        identity = subject.identity(side)
        rule = {**identity, **asdict(sampling), "stop": sorted(subject.encoder.stop_ids)}
        tasks += [Task(side, i, digest([rule, prompt]), prompt=prompt) for i, prompt in prompts.items()]
        for i, example in examples.items():
            key = digest(["likelihood", identity, example.ids, example.supervised])
            tasks.append(Task(side, i, key, example=example))
        for i, (prompt, rests) in choices.items():
            key = digest(["choices", identity, prompt, rests])
            tasks.append(Task(side, i, key, prompt=prompt, choices=rests))
    return tasks


def work(subject: Subject, tasks: Sequence[Task], sampling: Sampling, memo: Memo, advance: Advance) -> None:
    """Does the tasks that `memo` lacks, longest first, so that what needs most memory and time comes first."""
    missing = {task.key: task for task in tasks if task.key not in memo}
    ordered = sorted(missing.values(), key=lambda task: -task.length)
    for side in dict.fromkeys(task.side for task in ordered):
        mine = [task for task in ordered if task.side == side]
        with subject.side(side):
            riders, nothing = _riders(mine), replace(sampling, max_new_tokens=0)
            _read(subject, [task for task in mine if task.kind == "answers"], riders, sampling, memo, advance)
            unread = [task for task in mine if task.choices and task.key not in memo]
            _read(subject, unread, riders, nothing, memo, advance)
            _weigh(subject, [task for task in mine if task.example and task.key not in memo], memo, advance)


def collect(tasks: Sequence[Task], memo: Memo, count: int, side: Side) -> list[Answer]:
    """One side's answers to `count` questions, in their order; what no task asked for is None."""
    found: list[Result] = [{} for _ in range(count)]
    for task in tasks:
        if task.side == side:
            found[task.question].update(memo[task.key])
    return [Answer(**{k: v for k, v in result.items() if k != "key"}) for result in found]


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


class Memo:
    """Results by key, a JSON line each, appended as they come, by one process or several."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as file:
            whole = file.read()
            kept = whole[: whole.rfind(b"\n") + 1]
            file.truncate(len(kept))  # a last line torn by a crash: what follows must not be glued to it
        self._results = {record["key"]: record for line in kept.splitlines() if (record := _record(line))}

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Result:
        return self._results[key]

    def keys(self) -> Set[str]:
        return self._results.keys()

    def add(self, results: dict[str, Result]) -> None:
        records = {key: {"key": key, **result} for key, result in results.items()}
        with self._locked() as file:
            file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records.values()))
        self._results |= records

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file, at its start to read and at its end to write, for this process alone."""
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file


def _record(line: bytes) -> Result | None:
    """A line of a memo; None for one that a full disk or a hand has spoilt, whose result is then made again."""
    try:
        record: Result = json.loads(line)
        return record if isinstance(record, dict) and "key" in record else None
    except ValueError:
        return None


def _prompts(subject: Subject, questions: Sequence[Conversation]) -> dict[int, list[int]]:
    asked = [i for i, question in enumerate(questions) if answerable(question)]
    return dict(zip(asked, subject.encoder.prompts([questions[i] for i in asked]), strict=True))


def _examples(subject: Subject, questions: Sequence[Conversation]) -> dict[int, Example]:
    complete = {i: full for i, question in enumerate(questions) if (full := answered(question)) is not None}
    examples = zip(complete, subject.encoder.examples(list(complete.values())), strict=True)
    return {i: example for i, example in examples if any(example.supervised[1:])}


def _choices(subject: Subject, questions: Sequence[Conversation]) -> dict[int, tuple[list[int], list[list[int]]]]:
    """By question with a known choice, its prompt and each choice as training would write it after the prompt."""
    from luthier.data.formats import written_choices

    labels, found = subject.run.recipe.data.labels, {}
    for i, question in enumerate(questions):
        if question.answer is not None and answerable(question):
            said = [Message("assistant", choice) for choice in written_choices(question.choices, labels)]
            examples = subject.encoder.examples([replace(question, messages=(*question.prompt, m)) for m in said])
            start = examples[0].prompt
            rests = _spelled(subject.encoder, [example.ids[start:] for example in examples])
            found[i] = examples[0].ids[:start], rests
    return found


def _spelled(encoder: Encoder, rests: list[list[int]]) -> list[list[int]]:
    """The tokens that spell each answer, without the end of the turn: whether a model goes on after `A` says nothing of
    `A`. Where one answer begins another, the end tells them apart, and all keep it."""
    bare = []
    for rest in rests:
        text, count = encoder.decode(rest), len(rest)
        while count > 1 and encoder.decode(rest[: count - 1]) == text:
            count -= 1
        bare.append(rest[:count])
    begins = any(a is not b and a == b[: len(a)] for a in bare for b in bare)
    return rests if begins else bare


def _riders(tasks: Sequence[Task]) -> dict[int, list[Rider]]:
    """By question, the tasks that ask for what follows the question's prompt: it need not be read again for them."""
    prompts = {task.question: task.prompt for task in tasks if task.prompt}
    found: dict[int, list[Rider]] = {question: [] for question in prompts}
    for task in tasks:
        if task.choices:
            found[task.question].append((task, task.choices))
        elif task.example and (rest := _rest(task.example, prompts.get(task.question) or [])):
            found[task.question].append((task, [rest]))
    return found


def _rest(example: Example, prompt: list[int]) -> list[int]:
    """The supervised tokens of a row, if they are what follows the prompt; else nothing."""
    start, count = len(prompt), sum(example.supervised[1:])
    # An earlier answer of the conversation may be supervised too: then the row is weighed whole.
    follows = start and example.ids[:start] == prompt and sum(example.supervised[start : start + count]) == count
    return example.ids[start : start + count] if follows else []


def _read(
    subject: Subject,
    tasks: Sequence[Task],
    riders: dict[int, list[Rider]],
    sampling: Sampling,
    memo: Memo,
    advance: Advance,
) -> None:
    """Reads the prompt of each task once, for its answer and for all that rides on it."""
    from luthier.model.generate import generate

    encoder, labels = subject.encoder, {rider.key: rider.label for several in riders.values() for rider, _ in several}
    for start in range(0, len(tasks), CHUNK):
        chunk = tasks[start : start + CHUNK]
        riding = [riders[task.question] for task in chunk]
        weighed = [[rest for _, rests in several for rest in rests] for several in riding]
        prompts, done = [task.prompt or [] for task in chunk], partial(_one_more, advance, chunk[0].label)
        made = generate(subject.model, prompts, sampling, encoder.stop_ids, continuations=weighed, progress=done)
        results: dict[str, Result] = {}
        for task, several, one in zip(chunk, riding, made, strict=True):
            if task.kind == "answers":
                results[task.key] = {"text": encoder.decode(one.ids), "stopped": one.stopped, "tokens": len(one.ids)}
            losses = iter(one.losses)
            results |= {rider.key: _weighed(rider, rests, islice(losses, len(rests))) for rider, rests in several}
        memo.add(results)
        for key in results.keys() - {task.key for task in chunk}:
            advance(labels[key], 1)


def _weighed(task: Task, rests: list[list[int]], losses: Iterator[float]) -> Result:
    if task.choices:
        return {"choices": list(losses), "choice_tokens": [len(rest) for rest in rests]}
    return {"nll": next(losses), "targets": len(rests[0])}


def _one_more(advance: Advance, label: str, done: int, total: int) -> None:
    advance(label, 1)


def _weigh(subject: Subject, tasks: Sequence[Task], memo: Memo, advance: Advance) -> None:
    for pack in micro_batches([task.length for task in tasks], PACK):
        chunk = [tasks[i] for i in pack]
        results = _losses(subject, [task.example for task in chunk if task.example])
        memo.add(dict(zip((task.key for task in chunk), results, strict=True)))
        advance(chunk[0].label, len(chunk))


def _losses(subject: Subject, examples: Sequence[Example]) -> list[Result]:
    """Of each row the summed negative log-likelihood (nats) of its supervised tokens, the rows packed in one pass."""
    import torch

    from luthier.kernels.loss import token_losses

    micro, counts = _packed(examples, subject.model.device), [sum(e.supervised[1:]) for e in examples]
    losses = token_losses(subject.model.hidden(micro), subject.model.head, micro.targets)
    return [{"nll": float(row.sum()), "targets": len(row)} for row in torch.split(losses, counts)]


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
