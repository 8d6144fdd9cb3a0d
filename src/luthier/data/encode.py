"""Conversations to examples by several processes: where rows are many, rendering and encoding is most of the work.

The results come in the order of the rows, and are those of one process. A worker is a process of this program that
holds an Encoder; it ends when its input does. What a lost worker leaves undone is encoded here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import accumulate, chain, islice, pairwise
from queue import SimpleQueue
from typing import IO, Any

from luthier import errors
from luthier.data.conversation import Conversation, Example, from_json, to_json
from luthier.data.templates import Template
from luthier.data.tokens import Encoder, Tokenizer
from luthier.errors import LuthierError
from luthier.machine import machine

Encoded = list[Example | LuthierError]

WORTH = 16
"""Chunks that are encoded here before others help: starting a process takes as long as some thousand rows."""
_MOST = 8  # reading, cleaning and storing stay in this process, and it keeps no more than these busy


def encode(
    encoder: Encoder, chunks: Iterator[list[Conversation]], processes: int | None = None
) -> Iterator[tuple[list[Conversation], Encoded]]:
    """Each chunk with its rows' examples; a row that cannot be encoded has its error there.

    Args:
        processes: workers to use from the start. None: one for each free core, once there are rows enough.
    """
    if processes is None:
        for chunk in islice(chunks, WORTH):
            yield chunk, attempt(encoder, chunk)
        first = next(chunks, None)
        if first is None:
            return
        chunks, processes = chain([first], chunks), min(_MOST, machine().free_cores)
    with _Workers(encoder, processes) as workers:
        yield from workers.encode(chunks)


def attempt(encoder: Encoder, chunk: Sequence[Conversation]) -> Encoded:
    """All rows at once; one that the template refuses must not take the others with it."""
    try:
        return [*encoder.examples(chunk)]
    except LuthierError as error:
        return [error] if len(chunk) == 1 else [result for row in chunk for result in attempt(encoder, [row])]


class _Workers(ExitStack):
    """Processes that encode, each asked by a thread that waits for its answer."""

    def __init__(self, encoder: Encoder, count: int) -> None:
        super().__init__()
        self._encoder, self._count = encoder, count
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._threads = self.enter_context(ThreadPoolExecutor(count))
        tokenizer, template = encoder.tokenizer.spec, encoder.template.spec()
        hello = {"tokenizer": tokenizer, "template": template, "rule": [encoder.supervise, encoder.system]}
        for _ in range(count):
            worker = _start()
            self.callback(_end, worker)
            self._threads.submit(self._greet, worker, _line(hello))
        self.callback(self._threads.shutdown, wait=False, cancel_futures=True)

    def encode(self, chunks: Iterable[list[Conversation]]) -> Iterator[tuple[list[Conversation], Encoded]]:
        waiting: deque[tuple[list[Conversation], Future[Encoded | None]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, self._threads.submit(self._ask, chunk)))
            if len(waiting) > 2 * self._count:
                yield self._answered(*waiting.popleft())
        while waiting:
            yield self._answered(*waiting.popleft())

    def _answered(
        self, chunk: list[Conversation], answer: Future[Encoded | None]
    ) -> tuple[list[Conversation], Encoded]:
        results = answer.result()
        return chunk, attempt(self._encoder, chunk) if results is None else results

    def _greet(self, worker: subprocess.Popen[bytes], hello: bytes) -> None:
        try:
            _send(worker, hello)
        finally:
            self._idle.put(worker)

    def _ask(self, chunk: list[Conversation]) -> Encoded | None:
        """None where the worker is gone, went while it answered, or cannot be sent the chunk."""
        worker = self._idle.get()
        try:
            _send(worker, _line([_message(conversation) for conversation in chunk]))
            assert worker.stdout is not None
            return _read_examples(worker.stdout, chunk)
        except (OSError, ValueError, TypeError):
            return None
        finally:
            self._idle.put(worker)


def _start() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "luthier.data.encode"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pipesize=1 << 20,  # a chunk whole: each further read would wait for the interpreter's lock
        start_new_session=True,  # an interrupt at the terminal is this process's to answer
    )


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    with suppress(OSError), worker:  # its pipe may still hold what it never read
        pass


def _send(worker: subprocess.Popen[bytes], line: bytes) -> None:
    assert worker.stdin is not None
    worker.stdin.write(line)
    worker.stdin.flush()


def _message(conversation: Conversation) -> dict[str, Any]:
    """What a template reads."""
    return to_json(replace(conversation, references=(), choices=(), answer=None, meta={}))


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


# An answer is a line of JSON (of each row its length and prompt, or its error), the ids and the supervision as bytes.


def _write_examples(out: IO[bytes], results: Encoded) -> None:
    rows = [_error(r) if isinstance(r, LuthierError) else [len(r.ids), r.prompt] for r in results]
    examples = [r for r in results if isinstance(r, Example)]
    ids = array("i", chain.from_iterable(e.ids for e in examples)).tobytes()
    supervised = bytes(chain.from_iterable(e.supervised for e in examples))
    out.write(_line(rows) + ids + supervised)
    out.flush()


def _read_examples(answer: IO[bytes], chunk: Sequence[Conversation]) -> Encoded:
    rows = json.loads(answer.readline())
    bounds = list(accumulate((0 if isinstance(row, dict) else row[0] for row in rows), initial=0))
    ids = array("i")
    ids.frombytes(answer.read(bounds[-1] * ids.itemsize))
    learned = answer.read(bounds[-1])
    if len(learned) < bounds[-1]:
        raise ValueError("the answer is cut short")
    return [
        _raised(row) if isinstance(row, dict) else Example(ids[a:b].tolist(), list(learned[a:b]), row[1], c.origin)
        for row, c, (a, b) in zip(rows, chunk, pairwise(bounds), strict=True)
    ]


def _error(error: LuthierError) -> dict[str, Any]:
    return {"kind": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}


def _raised(values: dict[str, Any]) -> LuthierError:
    kind: type[LuthierError] = getattr(errors, values.pop("kind"))
    return kind(values.pop("what"), **values)


def main() -> None:
    """One worker."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    lines = sys.stdin.buffer
    made = json.loads(lines.readline())
    tokenizer = Tokenizer(**made["tokenizer"])
    encoder = Encoder(tokenizer, Template.from_spec(made["template"], tokenizer), *made["rule"])
    for line in lines:
        _write_examples(out, attempt(encoder, [from_json(values) for values in json.loads(line)]))


if __name__ == "__main__":
    main()
