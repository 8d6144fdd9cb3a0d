"""What can go wrong, as a tree. Every error tells a person what happened, where, and what to do.

LuthierError
├── UsageError        the command line itself (exit 2)
├── RecipeError       a recipe file or an override
├── DataError         a data file, a row, a field
├── TemplateError     a chat template that fails, or breaks the contract between training and inference
├── ModelError        a base model, its folder or its tokenizer
├── AdapterError      an adapter file, or targets that match nothing
├── RunError          a run folder: locked, changed, unfinished
├── CheckpointError   a checkpoint that cannot be written or trusted
├── MemoryPlanError   a plan that does not fit the machine
├── NotFiniteError    a loss or gradient that is not a finite number
└── Stopped           a signal or a lost worker ended the run; it can be resumed (exit 3, 130, 143)
"""

from __future__ import annotations


class LuthierError(Exception):
    """An error that is the user's to read: one paragraph, no traceback.

    Args:
        what: what happened, in one sentence without a final full stop.
        where: the place (`file:line: field`), or empty.
        fix: what to do about it, or empty.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}; {self.fix}" if self.fix else f"{place}{self.what}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(kind: type[LuthierError], what: str, where: str, fix: str) -> LuthierError:
    return kind(what, where=where, fix=fix)


class UsageError(LuthierError):
    exit_code = 2


class RecipeError(LuthierError):
    pass


class DataError(LuthierError):
    pass


class TemplateError(LuthierError):
    pass


class ModelError(LuthierError):
    pass


class AdapterError(LuthierError):
    pass


class RunError(LuthierError):
    pass


class CheckpointError(LuthierError):
    pass


class MemoryPlanError(LuthierError):
    pass


class NotFiniteError(LuthierError):
    pass


class Stopped(LuthierError):
    """The run ended early but can be resumed by the same command. `exit_code` is 3, or 128 + the signal's number."""

    def __init__(self, what: str, *, where: str = "", fix: str = "", exit_code: int = 3) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = exit_code
