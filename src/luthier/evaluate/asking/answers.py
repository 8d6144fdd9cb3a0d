"""Answers and likelihoods of a subject: planned as tasks, done in any order by any process, and kept as they come.

A task's key says everything that decides its result. So a stopped comparison goes on where it was, results of other
settings do no harm, and the base's answers serve the next adapter too.
"""

from __future__ import annotations

import fcntl
import json
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, islice
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

from luthier.data.conversation import Conversation, Message, Origin
from luthier.data.packing import micro_batches
from luthier.errors import MemoryPlanError
from luthier.evaluate.asking.subject import SIDES, Side, Subject
from luthier.evaluate.asking.suite import answerable, answered, digest
from luthier.evaluate.metrics import Answer
from luthier.runs import Run, naming
from luthier.strict import dumps

if TYPE_CHECKING:
    import torch

    from luthier.data.conversation import Example
    from luthier.data.stream import Micro
    from luthier.data.tokens import Encoder
    from luthier.model.causal import CausalModel
    from luthier.model.generate import Generation, Sampling

Result = dict[str, Any]
Advance = Callable[[str, int], None]
"""Told of a label (`base answers`) and how many more of its tasks are done."""

CHUNK, CHUNK_ON_GPU = 128, 1024
"""The most prompts that are answered together before their answers are kept."""
CHUNK_TOKENS = 1 << 14
"""The most tokens of theirs on a CPU, which takes no longer for two halves (docs/log.md): little is lost by a kill."""
PACK = 1024
"""Tokens of the rows whose likelihoods are taken in one pass: enough to keep a processor busy."""
ENCODED = 1024
"""Rows that are encoded together: until they are told apart, a token is an object of its own."""


class Text(NamedTuple):
    """A row as tokens, held in a tenth of an `Example`'s memory; `supervised` has a byte for each."""

    ids: array[int]
    supervised: bytes

    @classmethod
    def of(cls, example: Example) -> Text:
        return cls(array("i", example.ids), bytes(example.supervised))


@dataclass(frozen=True, slots=True)
class Task:
    """One side's answer to a question's `prompt`, the likelihood of its `text`, or those of the `choices` that may
    follow its `prompt`. Choices that are spelled with `characters` characters each; `unasked`: with no question asked;
    `origin`: where the question is from.
    """

    side: Side
    question: int
    key: str
    prompt: array[int] | None = None
    text: Text | None = None
    choices: list[list[int]] | None = None
    characters: tuple[int, ...] = ()
    unasked: bool = False
    origin: Origin | None = None

    @property
    def place(self) -> tuple[int, bool]:
        """Tasks of one place have one prompt."""
        return self.question, self.unasked

    @property
    def kind(self) -> Literal["answers", "likelihoods", "choices"]:
        return "likelihoods" if self.text else "choices" if self.choices else "answers"

    @property
    def label(self) -> str:
        return f"{self.side} {self.kind}"

    @property
    def length(self) -> int:
        """Tokens that are read."""
        return len(self.prompt or (self.text.ids if self.text else ()))


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
    references (`nll`) and of their choices (`choices`), also with no question asked (`unasked`), on each side. A
    reference's targets are the tokens that training would supervise, so that exp(mean) is the perplexity of the
    held-out loss."""
    prompts = _prompts(subject, questions) if "text" in needs else {}
    texts = _texts(subject, questions) if "nll" in needs else {}
    labels = subject.run.recipe.data.labels
    choices = choices_of(subject, questions, labels) if {"choices", "unasked"} & set(needs) else {}
    bare = [_without_question(question) for question in questions]
    unasked = choices_of(subject, bare, labels) if "unasked" in needs else {}
    tasks = []
    for side in sides:
        rule = {**subject.identity(side), **_decoding(sampling), "stop": sorted(subject.encoder.stop_ids)}
        tasks += [Task(side, i, digest([rule, prompt.tolist()]), prompt=prompt) for i, prompt in prompts.items()]
        tasks += likelihoods(subject, side, texts)
        tasks += choosing(subject, side, choices) + choosing(subject, side, unasked, unasked=True)
    return located(tasks, [question.origin for question in questions])


def located(tasks: Iterable[Task], origins: Sequence[Origin], start: int = 0) -> list[Task]:
    """The same, which know where their questions are from; these are numbered from `start`."""
    return [replace(task, origin=origins[task.question - start]) for task in tasks]


def likelihoods(subject: Subject, side: Side, texts: Mapping[int, Text]) -> list[Task]:
    """The tasks of weighing some texts, by question."""
    identity = subject.identity(side)
    keys = {i: digest(["likelihood", identity, text.ids.tolist(), list(text.supervised)]) for i, text in texts.items()}
    return [Task(side, i, keys[i], text=text) for i, text in texts.items()]


def choosing(subject: Subject, side: Side, choices: Mapping[int, Choices], *, unasked: bool = False) -> list[Task]:
    """The tasks of weighing choices, by question."""
    identity = subject.identity(side)
    return [
        Task(side, i, digest(["choices", identity, prompt, rests]), array("i", prompt), None, rests, lengths, unasked)
        for i, (prompt, rests, lengths) in choices.items()
    ]


def work(
    subject: Subject,
    tasks: Sequence[Task],
    sampling: Sampling,
    memo: Memo,
    advance: Advance,
    *,
    in_flight: int | None = None,
    processes: int = 1,
) -> None:
    """Does the tasks that `memo` lacks, longest first, so that what needs most memory and time comes first.

    Args:
        in_flight: the most tokens that have their keys and values held together, and no more memory is taken; None: as
            many as a part of the free memory holds, and beside them packed weights as `unpacked_where_free` has it.
        processes: how many do such work at the same time, and share the memory.
    """
    missing = {task.key: task for task in tasks if task.key not in memo}
    ordered = sorted(missing.values(), key=lambda task: -task.length)
    for side in dict.fromkeys(task.side for task in ordered):
        mine = [task for task in ordered if task.side == side]
        with subject.side(side), nullcontext() if in_flight else unpacked_where_free(subject.model, processes):
            riders, nothing = _riders(mine), replace(sampling, max_new_tokens=0)
            read = partial(_read, subject, riders=riders, memo=memo, advance=advance, in_flight=in_flight)
            read([task for task in mine if task.kind == "answers"], sampling)
            read([task for task in mine if task.choices and task.key not in memo], nothing)
            _weigh(subject, [task for task in mine if task.text and task.key not in memo], memo, advance)


def unpacked_where_free(model: CausalModel, processes: int = 1) -> AbstractContextManager[None]:
    """Half of the free memory, shared by the `processes`, is for what products read of packed weights."""
    from luthier.model.place import free_memory
    from luthier.model.quantize import unpacked

    return unpacked(model.module, free_memory(model.device, model.memory) // 2 // processes)


def collect(tasks: Sequence[Task], memo: Memo, count: int, side: Side) -> list[Answer]:
    """One side's answers to the first `count` questions, in their order; what no task asked for is None."""
    found: list[Result] = [{} for _ in range(count)]
    for task in tasks:
        if task.side == side and task.question < count:
            found[task.question].update(_part(task, memo[task.key]))
    return [Answer(**{k: v for k, v in result.items() if k != "key"}) for result in found]


def _part(task: Task, result: Result) -> Result:
    """What a task's result is to its question's answer."""
    if task.unasked:
        return {"unasked": result["choices"]}
    return {**result, "choice_characters": task.characters} if task.choices else result


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


def _decoding(sampling: Sampling) -> dict[str, Any]:
    """What of the decoding decides an answer: nothing is drawn where the likeliest token is taken, so that runs of
    other seeds share the answers of their base."""
    drawn = ("seed", "top_p") if sampling.temperature == 0 else ()
    return {name: value for name, value in asdict(sampling).items() if name not in drawn}


class Memo:
    """Results by key, a JSON line each, appended as they come, by one process or several. Those in the files `others`
    are read, never written. Held as the lines that they are, as values they would take several times the memory; and
    of what was there before, those of the keys in `only` alone, from byte `start` of the file (see `Places`), or all of
    it where no line ends there: the file is another one."""

    def __init__(
        self, path: Path, others: Iterable[Path] = (), *, only: Set[str] | None = None, start: int = 0
    ) -> None:
        self.path, self._lines = path, dict[str, bytes]()
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in others:
            if other.exists():
                with other.open("rb") as file:
                    self._keep(file, only)
        with self._locked() as file:
            start = start if _ends(file, b"\n", start) else 0
            file.seek(start)
            whole = start + self._keep(file, only)
            if whole < file.tell():
                file.truncate(whole)  # a last line torn by a crash: what follows must not be glued to it

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __getitem__(self, key: str) -> Result:
        record = _record(self._lines[key])
        assert record is not None
        return record

    def keys(self) -> Set[str]:
        return self._lines.keys()

    def add(self, results: dict[str, Result]) -> None:
        lines = {key: dumps({"key": key, **result}).encode() + b"\n" for key, result in results.items()}
        with self._locked() as file:
            file.write(b"".join(lines.values()))
        self._lines |= lines

    def _keep(self, file: BinaryIO, only: Set[str] | None) -> int:
        """Takes the lines of a file, and returns how many bytes of it are whole lines."""
        whole = 0
        for line in file:
            whole += len(line) if line.endswith(b"\n") else 0
            record = _record(line)
            if record is not None and (only is None or record["key"] in only):
                self._lines[record["key"]] = line
        return whole

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file, at its start to read and at its end to write, for this process alone."""
        with naming(self.path), self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file


class Places:
    """Where in a memo's file which result stands, some 200 bytes a result. Who asks for a part of them at a time reads
    the file once: `read` says to which byte, and a line that has no end yet is left for the next time. A file that has
    been replaced, or cut, is read anew."""

    def __init__(self, path: Path) -> None:
        self.path, self.read, self._last, self._places = path, 0, b"", dict[str, int]()

    def lines(self, keys: Set[str]) -> list[bytes]:
        """The lines of those results that are there, whoever wrote them meanwhile."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            self._read_on(file)
            return [_line_at(file, place) for place in sorted(self._places[key] for key in keys & self._places.keys())]

    def _read_on(self, file: BinaryIO) -> None:
        if not _ends(file, self._last, self.read):
            self.read, self._last, self._places = 0, b"", {}
        file.seek(self.read)
        for line in file:
            if not line.endswith(b"\n"):
                break
            if (record := _record(line)) is not None:
                self._places[record["key"]] = self.read
            self.read, self._last = self.read + len(line), line


def _ends(file: BinaryIO, line: bytes, end: int) -> bool:
    """Whether `line` ends at byte `end`. Nothing else tells that a file is the same: a new one may get its inode."""
    file.seek(max(0, end - len(line)))
    return file.read(len(line)) == line


def _line_at(file: BinaryIO, place: int) -> bytes:
    file.seek(place)
    return file.readline()


def _record(line: bytes) -> Result | None:
    """A line of a memo; None for one that a full disk or a hand has spoilt, whose result is then made again."""
    try:
        record: Result = json.loads(line)
        return _with_nan(record) if isinstance(record, dict) and "key" in record else None
    except ValueError:
        return None


def _with_nan(value: Any) -> Any:
    """What was not finite, and is null in a memo, for no result holds None: a likelihood that is not known is not one
    that nobody asked for."""
    if isinstance(value, dict):
        return {key: _with_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_nan(inner) for inner in value]
    return nan if value is None else value


def _prompts(subject: Subject, questions: Sequence[Conversation]) -> dict[int, array[int]]:
    found: dict[int, array[int]] = {}
    for part in _parts(questions):
        asked = {i: question for i, question in part.items() if answerable(question)}
        found |= zip(asked, (array("i", p) for p in subject.encoder.prompts(list(asked.values()))), strict=True)
    return found


def _texts(subject: Subject, questions: Sequence[Conversation]) -> dict[int, Text]:
    found: dict[int, Text] = {}
    for part in _parts(questions):
        complete = {i: full for i, question in part.items() if (full := answered(question)) is not None}
        examples = zip(complete, subject.encoder.examples(list(complete.values())), strict=True)
        found |= {i: Text.of(example) for i, example in examples if any(example.supervised[1:])}
    return found


def _parts(questions: Sequence[Conversation]) -> Iterator[dict[int, Conversation]]:
    """The questions by their numbers, as many at a time as are encoded together."""
    numbered = enumerate(questions)
    return iter(lambda: dict(islice(numbered, ENCODED)), {})


Choices = tuple[list[int], list[list[int]], tuple[int, ...]]
"""A prompt, the tokens of each choice that may follow it, and how many characters they spell."""


def _without_question(question: Conversation) -> Conversation:
    """What is left of it for `accuracy_calibrated`: its system message and an empty turn of the user's."""
    system = [message for message in question.prompt if message.role == "system"]
    return replace(question, messages=(*system, Message("user", ""))) if answerable(question) else question


def choices_of(subject: Subject, questions: Sequence[Conversation], labels: str) -> dict[int, Choices]:
    """By question with choices, its prompt and each choice as training would write it after the prompt; `labels` as in
    the recipe."""
    from luthier.data.formats import written_choices

    found: dict[int, Choices] = {}
    for i, question in enumerate(questions):
        if question.choices and answerable(question):
            written = written_choices(question.choices, labels)
            said = [replace(question, messages=(*question.prompt, Message("assistant", text))) for text in written]
            examples = subject.encoder.examples(said)
            start = examples[0].prompt
            rests = _spelled(subject.encoder, [example.ids[start:] for example in examples])
            found[i] = examples[0].ids[:start], rests, tuple(map(len, written))
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


def _riders(tasks: Sequence[Task]) -> dict[tuple[int, bool], list[Rider]]:
    """By place, the tasks that ask for what follows its prompt: it need not be read again for them."""
    prompts = {task.place: task.prompt for task in tasks if task.prompt}
    found: dict[tuple[int, bool], list[Rider]] = {place: [] for place in prompts}
    for task in tasks:
        if task.choices:
            found[task.place].append((task, task.choices))
        elif task.text and (rest := _rest(task.text, prompts.get(task.place) or array("i"))):
            found[task.place].append((task, [rest]))
    return found


def _rest(text: Text, prompt: array[int]) -> list[int]:
    """The supervised tokens of a row, if they are what follows the prompt; else nothing."""
    start, count = len(prompt), sum(text.supervised[1:])
    # An earlier answer of the conversation may be supervised too: then the row is weighed whole.
    follows = start and text.ids[:start] == prompt and sum(text.supervised[start : start + count]) == count
    return text.ids[start : start + count].tolist() if follows else []


def _read(
    subject: Subject,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    riders: dict[tuple[int, bool], list[Rider]],
    memo: Memo,
    advance: Advance,
    in_flight: int | None,
) -> None:
    """Reads the prompt of each task once, for its answer and for all that rides on it."""
    from luthier.model.generate import SHORTER, SHORTER_OR_LESS, generate

    for chunk in chunks(tasks, sampling.max_new_tokens, subject.model.device.type):
        riding = [riders[task.place] for task in chunk]
        weighed = [[rest for _, rests in several for rest in rests] for several in riding]
        prompts = [task.prompt.tolist() if task.prompt else [] for task in chunk]
        results: dict[str, Result] = {}
        try:
            generate(
                subject.model,
                prompts,
                sampling,
                subject.encoder.stop_ids,
                continuations=weighed,
                answered=partial(_take, subject.encoder, chunk, riding, results, advance),
                max_tokens_in_flight=in_flight,
                where=[str(task.origin or "") for task in chunk],
                fix=SHORTER_OR_LESS if sampling.max_new_tokens else SHORTER,
            )
        finally:
            memo.add(results)  # also those that were there before something failed


def _take(
    encoder: Encoder,
    tasks: Sequence[Task],
    riding: Sequence[list[Rider]],
    results: dict[str, Result],
    advance: Advance,
    row: int,
    one: Generation,
) -> None:
    """Adds what came of one of the tasks, and of all that rides on it."""
    task, losses = tasks[row], iter(one.losses)
    if task.kind == "answers":
        results[task.key] = {"text": encoder.decode(one.ids), "stopped": one.stopped, "tokens": len(one.ids)}
    results |= {rider.key: _weighed(rider, rests, islice(losses, len(rests))) for rider, rests in riding[row]}
    for label in [task.label, *(rider.label for rider, _ in riding[row] if rider is not task)]:
        advance(label, 1)


def chunks(tasks: Sequence[Task], new_tokens: int, place: str) -> Iterator[Sequence[Task]]:
    """The tasks, longest first, in parts that are done and kept together."""
    start = 0
    while start < len(tasks):
        size = CHUNK_ON_GPU if place == "cuda" else min(CHUNK, CHUNK_TOKENS // (tasks[start].length + new_tokens))
        yield tasks[start : start + max(1, size)]
        start += max(1, size)


def _weighed(task: Task, rests: list[list[int]], losses: Iterator[float]) -> Result:
    if task.choices:
        return {"choices": list(losses), "choice_tokens": [len(rest) for rest in rests]}
    return {"nll": next(losses), "targets": len(rests[0])}


def _weigh(subject: Subject, tasks: Sequence[Task], memo: Memo, advance: Advance, tokens: int = PACK) -> None:
    """The likelihoods of rows, at most so many tokens of theirs in a pass, and half as many where memory runs out.
    Raises MemoryPlanError where one row alone does not fit."""
    from luthier.model.generate import SHORTER
    from luthier.model.memory import attempt, release
    from luthier.model.quantize import forget_unpacked

    for pack in micro_batches([task.length for task in tasks], tokens):
        chunk = [tasks[i] for i in pack]
        results = attempt(partial(_losses, subject, [task.text for task in chunk if task.text]))
        if results is None:
            if len(chunk) == 1 and not forget_unpacked(subject.model.module):
                what = f"a row of {chunk[0].length:,} tokens does not fit into memory by itself"
                raise MemoryPlanError(what, where=str(chunk[0].origin or ""), fix=SHORTER)
            release()
            left, most = [task for task in tasks if task.key not in memo], sum(task.length for task in chunk) // 2
            return _weigh(subject, left, memo, advance, most)
        memo.add(dict(zip((task.key for task in chunk), results, strict=True)))
        advance(chunk[0].label, len(chunk))


def _losses(subject: Subject, texts: Sequence[Text]) -> list[Result]:
    """Of each row the summed negative log-likelihood (nats) of its supervised tokens, the rows packed in one pass."""
    import torch

    from luthier.kernels.loss import token_losses

    micro, counts = _packed(texts, subject.model.device), [sum(text.supervised[1:]) for text in texts]
    losses = token_losses(subject.model.hidden(micro), subject.model.head, micro.targets)
    return [{"nll": float(row.sum()), "targets": len(row)} for row in torch.split(losses, counts)]


def _packed(texts: Sequence[Text], device: torch.device) -> Micro:
    import torch

    from luthier.data.stream import Micro

    lengths = [len(text.ids) for text in texts]
    ids = torch.tensor([i for text in texts for i in text.ids])
    learned = torch.tensor([bit for text in texts for bit in (0, *text.supervised[1:])]).nonzero()[:, 0]
    return Micro(
        ids=ids.to(device),
        positions=torch.cat([torch.arange(length) for length in lengths]).to(device),
        bounds=tuple(accumulate(lengths, initial=0)),
        rows=(learned - 1).to(device),
        targets=ids[learned].to(device),
        samples=torch.arange(len(texts), device=device),
        step=0,
    )
