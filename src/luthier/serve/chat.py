"""Talking with a run in the terminal: the template of training, the answer as it is made, the base beside it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TextIO

from luthier.data.conversation import Conversation, Message, Origin
from luthier.errors import LuthierError, UsageError
from luthier.evaluate.asking.answers import sampling_of
from luthier.evaluate.asking.subject import Side, Subject
from luthier.evaluate.terminal import printable
from luthier.runs import Run
from luthier.train.interrupt import Interrupt

if TYPE_CHECKING:
    from luthier.model.generate import Sampling

HELP = "/reset starts over, /quit or Ctrl-D ends the chat, Ctrl-C stops an answer"
_ANEW = "a chat is not kept: the same command begins anew"
LEAST_NEW_TOKENS = 256
"""A recipe's limit is cut to its test answers; a chat may go on for longer."""


def chat(run: Run, *, both: bool = False, lines: Iterable[str] | None = None, out: TextIO | None = None) -> int:
    """Answers `lines` (standard input if not given) one by one until they end or say /quit. Returns 0.

    `both` lets the base model answer first, each side with its own history. Raises what `Subject.open` raises.
    """
    out = out or sys.stdout
    subject = Subject.open(run)
    wanted = sampling_of(run)
    sampling = replace(wanted, max_new_tokens=max(wanted.max_new_tokens, LEAST_NEW_TOKENS))
    sides: tuple[Side, ...] = ("base", "tuned") if both else ("tuned",)
    talks = [Talk(subject, side, sampling) for side in sides]
    typed = lines is None and sys.stdin.isatty()
    if typed:
        print(f"{run.folder.name}, {run.recipe.model.base}: {HELP}", file=out)
    for line in _typed(out) if typed else lines or sys.stdin:
        said = line.strip()
        if said == "/quit":
            break
        if said.startswith("/"):
            print(_command(said, talks), file=out, flush=True)
        elif said:
            for talk in talks:
                _show(talk, said, f"{talk.side}: " if both else "", out)
    return 0


@dataclass
class Talk:
    """One side's conversation."""

    subject: Subject
    side: Side
    sampling: Sampling
    messages: list[Message] = field(default_factory=list)

    def reset(self) -> None:
        self.messages = []

    def answer(self, said: str) -> Generator[str]:
        """Appends a user turn and gives the answer in pieces as it is made. What was given is remembered as the answer,
        also where the reader stops early; a turn that cannot be answered is forgotten, and raises LuthierError."""
        asked = [*self.messages, Message("user", said)]
        prompt = self.subject.encoder.prompts([Conversation(tuple(asked), Origin("chat", 1))])[0]
        sampling = replace(self.sampling, max_new_tokens=self._room(len(prompt)))
        answered, given = False, ""
        try:
            for piece in self._pieces(prompt, sampling):
                answered, given = True, given + piece
                yield piece
        finally:
            if answered:
                self.messages = [*asked, Message("assistant", given.strip())]

    def _pieces(self, prompt: list[int], sampling: Sampling) -> Iterator[str]:
        from luthier.model.generate import SHORTER, stream

        encoder, shown, ids = self.subject.encoder, "", list[int]()
        cuts, fix = encoder.template.cuts, "/reset starts over" if self.messages else SHORTER
        with self.subject.side(self.side):
            for token in stream(self.subject.model, prompt, sampling, encoder.stop_ids, fix=fix):
                ids.append(token)
                ready = _settled(encoder.decode(ids), cuts)
                if len(ready) > len(shown) and ready.startswith(shown):
                    yield ready[len(shown) :]
                    shown = ready
                if cuts and any(cut in encoder.tokenizer.decode(ids) for cut in cuts):
                    break
        whole = encoder.decode(ids)
        if whole.startswith(shown):
            yield whole[len(shown) :]

    def _room(self, length: int) -> int:
        """Tokens that an answer may have within the model's window. Raises UsageError where none are left."""
        window = getattr(self.subject.model.module.config, "max_position_embeddings", None)
        room = min(self.sampling.max_new_tokens, window - length if window else self.sampling.max_new_tokens)
        if room < 1:
            raise UsageError("the conversation is as long as the model can read", fix="/reset starts over")
        return room


def _settled(text: str, cuts: Iterable[str]) -> str:
    """The part of an answer that more tokens cannot change: no half character, no beginning of a cut at its end."""
    text = text.rstrip("\ufffd")
    ends = [size for cut in cuts for size in range(1, len(cut)) if text.endswith(cut[:size])]
    return text[: len(text) - max(ends, default=0)].rstrip()


def _show(talk: Talk, said: str, label: str, out: TextIO) -> None:
    """Writes an answer as it comes; Ctrl-C ends the answer and not the chat, a second one at once and with it the chat.

    The signal is looked at between pieces: an exception may be raised where Python drops it, such as in a destructor.
    """
    out.write(label)
    pieces = talk.answer(said)
    with Interrupt(fix=_ANEW) as interrupt:
        try:
            for piece in pieces:
                out.write(printable(piece))
                out.flush()
                if interrupt.signal:
                    out.write(" [stopped]")
                    break
        except LuthierError as error:
            out.write(f"[{error}]")
        finally:
            pieces.close()
            out.write("\n")
            out.flush()
    if interrupt.signal == signal.SIGTERM:
        signal.raise_signal(interrupt.signal)  # again, for who takes it where no answer is made


def _command(said: str, talks: list[Talk]) -> str:
    if said == "/reset":
        for talk in talks:
            talk.reset()
        return "starting over"
    return HELP if said == "/help" else f"unknown command {printable(said)}: {HELP}"


def _typed(out: TextIO, read: Callable[[str], str] = input) -> Iterator[str]:
    """Lines typed at a prompt, with the keys of readline where Python has it; Ctrl-C at the prompt starts a new one."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() edits lines with it
    told = ""
    while True:
        try:  # around all that is done between two lines: a hand on Ctrl-C presses it more than once
            print(told, end="", file=out)
            told = ""
            line = read("> ")
        except EOFError:
            print(file=out)
            return
        except KeyboardInterrupt as error:
            if type(error) is not KeyboardInterrupt:  # another signal than Ctrl-C
                print(file=out)
                raise
            told = f"\n{HELP}\n"
        else:
            yield line
