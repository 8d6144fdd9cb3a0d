"""Tokenised rows on disk, memory-mapped: flat arrays beside a small JSON header. No pickle, nothing to parse."""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversation import Example, Origin
from luthier.errors import DataError
from luthier.strict import dumps

_VERSION = 1
_ARRAYS = {"ids": "<i4", "supervised": "u1", "offsets": "<i8", "prompts": "<i4", "files": "<i4", "lines": "<i8"}


class TokenStore:
    """Rows of token ids with a bit each, opened read-only and without reading them.

    Attributes:
        ids: int32 [tokens], all rows end to end.
        supervised: uint8 [tokens], 1 where the token is a target of the loss.
        offsets: int64 [n + 1], where each row starts and the last one ends.
        prompts: int32 [n], how many leading ids of a row inference would be given.
    """

    def __init__(self, folder: Path, arrays: dict[str, NDArray[Any]], names: list[str]) -> None:
        self.folder, self._names = folder, names
        self.ids: NDArray[np.int32] = arrays["ids"]
        self.supervised: NDArray[np.uint8] = arrays["supervised"]
        self.offsets: NDArray[np.int64] = arrays["offsets"]
        self.prompts: NDArray[np.int32] = arrays["prompts"]
        self._files, self._lines = arrays["files"], arrays["lines"]

    @classmethod
    def write(cls, folder: Path, examples: Iterable[Example]) -> TokenStore:
        """Writes rows as they come, aside, and gives the folder its name once it is complete."""
        with Writer(folder) as writer:
            for example in examples:
                writer.add(example)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Raises DataError where the folder holds no complete store."""
        try:
            header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
            version, sizes, names = header["version"], header["sizes"], header["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError("holds no token store", where=str(folder), fix="prepare the data again") from error
        if version != _VERSION:
            raise DataError(f"is a token store of version {version}", where=str(folder), fix="prepare the data again")
        return cls(folder, {n: _mapped(folder, n, kind, sizes[n]) for n, kind in _ARRAYS.items()}, names)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [n]: tokens of each row."""
        return np.diff(self.offsets)

    def example(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """`ids` int32 [L] and `supervised` uint8 [L] of one row: views of the file."""
        cut = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return self.ids[cut], self.supervised[cut]

    def as_example(self, row: int) -> Example:
        """One row as it was written."""
        ids, supervised = self.example(row)
        return Example(ids.tolist(), supervised.tolist(), int(self.prompts[row]), self.origin(row))

    def targets(self, row: int) -> int:
        """Supervised tokens that have a token before them: the terms of this row's loss."""
        return int(np.count_nonzero(self.example(row)[1][1:]))

    @property
    def supervised_tokens(self) -> int:
        """The terms of the loss over all rows: supervised tokens but for the first of each row."""
        starts = self.offsets[:-1][self.lengths > 0]
        return int(np.count_nonzero(self.supervised)) - int(np.count_nonzero(self.supervised[starts]))

    def origin(self, row: int) -> Origin:
        """The file and line this row came from."""
        return Origin(self._names[int(self._files[row])], int(self._lines[row]))

    def by_file(self, values: Mapping[str, float]) -> NDArray[np.float64]:
        """float64 [n]: the value of the file that each row came from."""
        of_each = np.array([values[name] for name in self._names], np.float64)
        return np.take(of_each, self._files)

    def select(self, folder: Path, rows: NDArray[np.int64]) -> TokenStore:
        """Writes the given rows, in the given order, as a store of their own."""
        with Writer(folder, self._names) as writer:
            for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                if len(run):
                    self._copy(writer, int(run[0]), int(run[-1]) + 1)
        return type(self).open(folder)

    def _copy(self, writer: Writer, start: int, stop: int) -> None:
        tokens = slice(int(self.offsets[start]), int(self.offsets[stop]))
        writer.extend(
            self.ids[tokens].tobytes(),
            self.supervised[tokens].tobytes(),
            self.lengths[start:stop].tolist(),
            self.prompts[start:stop].tolist(),
            self._files[start:stop].tolist(),
            self._lines[start:stop].tolist(),
        )


class Writer:
    """Appends rows to a store that gets its name when the `with` block ends well, and vanishes when it does not."""

    def __init__(self, folder: Path, names: Iterable[str] = ()) -> None:
        self._folder, self._aside = folder, folder.with_name(folder.name + ".partial")
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)
        self._ids = (self._aside / "ids").open("wb")
        self._supervised = (self._aside / "supervised").open("wb")
        self._offsets, self._prompts = array("q", [0]), array("i")
        self._files, self._lines = array("i"), array("q")
        self._names = {name: number for number, name in enumerate(names)}

    def add(self, example: Example) -> None:
        self._ids.write(array("i", example.ids).tobytes())
        self._supervised.write(bytes(example.supervised))
        self._offsets.append(self._offsets[-1] + len(example.ids))
        self._prompts.append(example.prompt)
        self._files.append(self._names.setdefault(example.origin.file, len(self._names)))
        self._lines.append(example.origin.line)

    def extend(
        self,
        ids: bytes,
        supervised: bytes,
        lengths: list[int],
        prompts: list[int],
        files: list[int],
        lines: list[int],
    ) -> None:
        """Appends rows as another store of the same file names has them."""
        self._ids.write(ids)
        self._supervised.write(supervised)
        self._offsets.extend(accumulate(lengths, initial=self._offsets.pop()))
        self._prompts.extend(prompts)
        self._files.extend(files)
        self._lines.extend(lines)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ids.close()
        self._supervised.close()
        if kind is not None:
            shutil.rmtree(self._aside, ignore_errors=True)
            return
        small = {"offsets": self._offsets, "prompts": self._prompts, "files": self._files, "lines": self._lines}
        for name, values in small.items():
            (self._aside / name).write_bytes(values.tobytes())
        tokens = self._offsets[-1]
        sizes = {"ids": tokens, "supervised": tokens} | {name: len(values) for name, values in small.items()}
        header = {"version": _VERSION, "sizes": sizes, "files": list(self._names)}
        (self._aside / "header.json").write_text(dumps(header), encoding="utf-8")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._aside.rename(self._folder)


def _mapped(folder: Path, name: str, kind: str, size: int) -> NDArray[Any]:
    path, dtype = folder / name, np.dtype(kind)
    if not path.is_file() or path.stat().st_size != size * dtype.itemsize:
        raise DataError(
            f"is not the {size} {dtype} values its header names", where=str(path), fix="prepare the data again"
        )
    if size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(size,))
