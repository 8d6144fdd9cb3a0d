"""The same text twice: exact and near duplicates in a set, and leaks between a test set and the training rows.

Texts are compared *folded* (case, width, spacing and prose punctuation do not count). Exact means equal fingerprints of
the folded text. Near means the Jaccard similarity of the sets of word 3-shingles (runs of three words; characters take
the place of words in scripts that put no spaces between them, and in texts of fewer than three words). System messages
and tools are left out of near comparisons: a long prompt shared by all rows says nothing about any of them.
"""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from luthier.data.conversation import Conversation, Message

Shingles = NDArray[np.uint32]
"""A set of shingle hashes: sorted and unique. Two shingles of a pair share a hash about once in 2^32 / (n·m) pairs."""

# Punctuation that changes what a text says (signs, operators, code) is kept; the rest is prose punctuation.
_MEANINGFUL = frozenset("+-*/%<>=^~|&$#@_\\")
# Scripts written without spaces: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han. Each character stands for a word.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


class _Folding(dict[int, str | None]):
    """A table for str.translate, filled as characters are met: prose punctuation and separators become a space,
    invisible format characters vanish, all else stays."""

    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        category = unicodedata.category(character)
        folded: str | None = character
        if category == "Cf":
            folded = None
        elif category == "Pd":
            folded = "-"
        elif category == "Cc" or (category[0] in "PZ" and character not in _MEANINGFUL):
            folded = " "
        self[code] = folded
        return folded


_FOLDING = _Folding()
_ASCII = "".join(_FOLDING[code] or "" for code in range(128)).lower().encode().ljust(256)


@lru_cache(maxsize=64)  # a row's messages are folded for its fingerprint, its shingles and its leak check
def fold(text: str) -> str:
    """`text` as it is compared: NFKC, case folded, prose punctuation and white space as single spaces. Idempotent."""
    if text.isascii():  # the same, ten times as fast
        return " ".join(text.encode().translate(_ASCII).decode().split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(_FOLDING).split())


def fingerprint(conversation: Conversation) -> bytes:
    """16 bytes that two conversations share exactly if their turns have the same roles and the same folded text."""
    return _digest(conversation.messages)


def _digest(messages: Iterable[Message]) -> bytes:
    digest = blake2b(digest_size=16)
    for message in messages:
        calls = str(message.tool_calls) if message.tool_calls else ""
        parts = (message.role, fold(message.content), fold(message.reasoning or ""), calls, "\x1e")
        digest.update("\x1f".join(parts).encode("utf-8", "surrogatepass"))
    return digest.digest()


class Duplicates:
    """Rows whose folded text was seen before. About 150 bytes a row."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}
        self._rows = 0

    def add(self, conversation: Conversation) -> int | None:
        """The number (from 0, in the order of `add`) of the first row with the same text, or None if this is it."""
        number, self._rows = self._rows, self._rows + 1
        first = self._seen.setdefault(fingerprint(conversation), number)
        return None if first == number else first


# --- shingles -------------------------------------------------------------------------------------------------------

_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
_MIX = np.uint64(0xD6E8FEB86659FD93)


class _Words(dict[str, int]):
    """Words to 64-bit hashes, the same in every process (unlike `hash`). Forgets all when it has grown large."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 1 << 18:
            self.clear()
        self[word] = value = int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        return value


_WORDS = _Words()


@lru_cache(maxsize=8)  # the same row is looked up among near duplicates and among leaks
def shingles(text: str) -> Shingles:
    """The set of hashes of all runs of three words of the folded text (of three characters, in a text of one or two
    words or of a script without spaces). Empty for a text without words. Not to be written to."""
    folded = fold(text)
    words = folded.split() if folded.isascii() else _WORD.findall(folded)
    if len(words) < 3:
        words = list(f" {folded} ") if folded else []
    if not words:
        return np.empty(0, np.uint32)
    hashes = np.fromiter(map(_WORDS.__getitem__, words), np.uint64, len(words))
    runs = hashes[:-2] * _ODD[0] + hashes[1:-1] * _ODD[1] + hashes[2:] * _ODD[2]
    return _unique((_mixed(runs) >> np.uint64(32)).astype(np.uint32))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A multiply-xorshift round: every bit of a value reaches the upper half of the result."""
    return (values ^ (values >> np.uint64(32))) * _MIX


def _unique(values: Shingles) -> Shingles:
    """np.unique, which spends 30 µs on its options."""
    values.sort()
    keep = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=keep[1:])
    return values[keep]


def jaccard(a: Shingles, b: Shingles) -> float:
    """Shared shingles over all shingles of two sets; 0 if either is empty."""
    if not len(a) or not len(b):
        return 0.0
    shared = len(a) + len(b) - len(_unique(np.concatenate((a, b))))
    return shared / (len(a) + len(b) - shared)


def _said(messages: Iterable[Message]) -> str:
    return "\n".join(m.content for m in messages if m.role != "system")


def common_shingles(conversations: Iterable[Conversation], share: float = 0.2) -> Shingles:
    """Shingles in more than `share` of the rows: an instruction repeated in every row, which makes rows look alike that
    are not. None for fewer than 20 rows, where a few true duplicates would look like an instruction."""
    sets = [shingles(_said(c.messages)) for c in conversations]
    if len(sets) < 20:
        return np.empty(0, np.uint32)
    values, counts = np.unique(np.concatenate(sets), return_counts=True)
    return values[counts > share * len(sets)]


def _without(found: Shingles, common: Shingles) -> Shingles:
    return found[~np.isin(found, common, assume_unique=True)] if len(common) else found


# --- near duplicates ------------------------------------------------------------------------------------------------

_HASHES = 128
_SLOTS = 1 << 20
_LONGEST_CHAIN = 128
_MOST_CHECKED = 64
_SPOOL = 128 << 20


class NearDuplicates:
    """Finds rows similar to an earlier row: MinHash signatures, banded into hash tables (LSH), then the exact Jaccard
    similarity of each candidate, so that nothing is called similar that is not.

    Broder, "On the resemblance and containment of documents" (1997); banding as in Leskovec et al., "Mining of Massive
    Datasets", chapter 3. Bands are chosen so that a pair at the threshold itself is found with probability 0.95.

    Memory does not depend on the length of the rows: per band 4 MiB of table, filled as used, and 6 bytes a row;
    shingles of earlier rows go to a temporary file beyond 128 MiB, which `close` lets go. A lookup reads at most 128
    entries of a slot and checks 64 rows: that bounds the time on sets full of half-alike rows, and may miss some there.

    Args:
        threshold: Jaccard similarity from which a row counts as a duplicate, in (0, 1].
        common: shingles that do not count, see `common_shingles`.
    """

    def __init__(self, threshold: float, common: Shingles | None = None) -> None:
        self.threshold = threshold
        self._common = np.empty(0, np.uint32) if common is None else common
        bands, self._band_rows = _banding(threshold)
        generator = np.random.default_rng(20_240_229)
        self._a = generator.integers(0, 1 << 32, (bands * self._band_rows, 1), np.uint32) | np.uint32(1)
        self._b = generator.integers(0, 1 << 32, (bands * self._band_rows, 1), np.uint32)
        self._combine = generator.integers(0, 1 << 63, self._band_rows, np.uint64) | np.uint64(1)
        self._bands = np.arange(bands)
        self._heads = np.zeros((bands, _SLOTS), np.uint32)  # the newest entry of each slot, from 1; 0 is none
        self._links = np.zeros((1024, bands), np.uint32)  # the entry before it in the same slot
        self._tags = np.zeros((1024, bands), np.uint16)  # tells apart the keys that share a slot
        self._numbers = np.zeros(1024, np.int64)  # the row an entry came from
        self._ends = np.zeros(1025, np.int64)  # where an entry's shingles end in the store
        self._store = tempfile.SpooledTemporaryFile(max_size=_SPOOL)  # noqa: SIM115 - lives until `close`
        self._entries = self._rows = 0

    def add(self, conversation: Conversation) -> int | None:
        """The number (from 0, in the order of `add`) of an earlier row at or above the threshold, or None.

        A row that is similar to an earlier one is not remembered: the caller drops it.
        """
        number, self._rows = self._rows, self._rows + 1
        found = _without(shingles(_said(conversation.messages)), self._common)
        if not len(found):
            return None
        slots, tags = self._keys(found)
        for entry in self._candidates(slots, tags):
            if self._similar(entry, found):
                return int(self._numbers[entry])
        self._remember(number, found, slots, tags)
        return None

    def close(self) -> None:
        """Lets go of the temporary file."""
        self._store.close()

    def _keys(self, found: Shingles) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
        """For each band, its slot and its tag: 36 bits of a hash of the band's part of the signature."""
        parts = [found[start : start + 4096] for start in range(0, len(found), 4096)]  # bounds the matrix at 2 MiB
        signature = reduce(np.minimum, ((part * self._a + self._b).min(axis=1) for part in parts))
        keys = _mixed(signature.astype(np.uint64).reshape(-1, self._band_rows) @ self._combine)
        return (keys >> np.uint64(44)).astype(np.int64), (keys >> np.uint64(28)).astype(np.uint16)

    def _candidates(self, slots: NDArray[np.int64], tags: NDArray[np.uint16]) -> list[int]:
        """Entries that share bands with the row, those that share most first, then the oldest."""
        bands, found = self._bands, []
        entries = self._heads[bands, slots]
        for _ in range(_LONGEST_CHAIN):
            alive = entries > 0
            if not alive.any():
                break
            bands, tags, entries = bands[alive], tags[alive], entries[alive] - np.uint32(1)
            found.append(entries[self._tags[entries, bands] == tags])
            entries = self._links[entries, bands]
        if not any(map(len, found)):
            return []
        known, shared = np.unique(np.concatenate(found), return_counts=True)
        return list(known[np.argsort(-shared, kind="stable")[:_MOST_CHECKED]].tolist())

    def _similar(self, entry: int, found: Shingles) -> bool:
        start, end = int(self._ends[entry]), int(self._ends[entry + 1])
        if min(end - start, len(found)) < self.threshold * max(end - start, len(found)):
            return False  # even if one held the other
        self._store.seek(4 * start)
        other = np.frombuffer(self._store.read(4 * (end - start)), np.uint32)
        return jaccard(found, other) >= self.threshold

    def _remember(self, number: int, found: Shingles, slots: NDArray[np.int64], tags: NDArray[np.uint16]) -> None:
        if self._entries == len(self._links):
            self._grow()
        entry, self._entries = self._entries, self._entries + 1
        self._numbers[entry] = number
        self._tags[entry] = tags
        self._links[entry] = self._heads[self._bands, slots]
        self._heads[self._bands, slots] = entry + 1
        self._store.seek(4 * int(self._ends[entry]))
        self._store.write(found.tobytes())
        self._ends[entry + 1] = self._ends[entry] + len(found)

    def _grow(self) -> None:
        more = len(self._links) // 2
        self._links = np.pad(self._links, ((0, more), (0, 0)))
        self._tags = np.pad(self._tags, ((0, more), (0, 0)))
        self._numbers = np.pad(self._numbers, (0, more))
        self._ends = np.pad(self._ends, (0, more))


def _banding(threshold: float) -> tuple[int, int]:
    """Bands and rows per band out of 128 hashes: the longest bands (fewest false candidates) that still find a pair at
    the threshold with probability 0.95."""
    rows = [r for r in range(1, _HASHES + 1) if 1 - (1 - threshold**r) ** (_HASHES // r) >= 0.95]
    longest = max(rows, default=1)
    return _HASHES // longest, longest


# --- leaks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Leak:
    """A training row that gives away test row number `row`. `kind`: `prompt` (the same question), `text` (the same
    question and answer, or document) or `near`; `similarity` is 1 for the first two."""

    row: int
    kind: str
    similarity: float


class Leaks:
    """Looks training rows up in a test set: exactly, by the prompt of any answer or by the whole text; nearly, by the
    Jaccard similarity of prompts or of whole texts. No leak at or above the threshold is missed: test sets are small
    enough for an inverted index, and a row that shares too few shingles with *all* of them is dismissed at once.

    Args:
        tests: the test rows; their references count as answers.
        threshold: Jaccard similarity from which two texts count as the same; None looks for exact leaks only.
    """

    def __init__(self, tests: Sequence[Conversation], threshold: float | None = 0.8) -> None:
        self._prompts: dict[bytes, int] = {}
        self._texts: dict[bytes, int] = {}
        for row, test in enumerate(tests):
            if test.prompt:
                self._prompts.setdefault(_digest(_unsystem(test.prompt)), row)
            for messages in _whole(test):
                self._texts.setdefault(_digest(_unsystem(messages)), row)
        self._near = None if threshold is None else _Inverted(tests, threshold)

    def find(self, conversation: Conversation) -> Leak | None:
        """The test row that `conversation` would give away if it were trained on, or None."""
        for prompt in _prompts(conversation):
            row = self._prompts.get(_digest(_unsystem(prompt)))
            if row is not None:
                return Leak(row, "prompt", 1.0)
        row = self._texts.get(_digest(_unsystem(conversation.messages)))
        if row is not None:
            return Leak(row, "text", 1.0)
        return self._near.find(conversation) if self._near else None


def _unsystem(messages: Iterable[Message]) -> Iterator[Message]:
    return (m for m in messages if m.role != "system")


def _prompts(conversation: Conversation) -> Iterator[tuple[Message, ...]]:
    """What stands before each answer of a conversation."""
    messages = conversation.messages
    return (messages[:i] for i, message in enumerate(messages) if i and message.role == "assistant")


def _whole(test: Conversation) -> Iterator[tuple[Message, ...]]:
    """The test row with each of its answers."""
    if test.messages != test.prompt or not test.references:
        yield test.messages
    for reference in test.references:
        yield (*test.prompt, Message("assistant", reference))


class _Inverted:
    """Shingle -> the texts that hold it, for texts of test rows: the prompt, and the prompt with its answer."""

    def __init__(self, tests: Sequence[Conversation], threshold: float) -> None:
        self._threshold = threshold
        self._common = common_shingles(tests)
        texts = [(row, text) for row, test in enumerate(tests) for text in _near_texts(test, _whole(test))]
        sets = [_without(shingles(text), self._common) for _, text in texts]
        self._rows = np.array([row for row, _ in texts], np.int64)
        self._sizes = np.array([len(s) for s in sets], np.int64)
        flat = np.concatenate(sets) if sets else np.empty(0, np.uint32)
        order = np.argsort(flat, kind="stable")
        self._holders = np.repeat(np.arange(len(sets)), self._sizes)[order]
        self._values, starts = np.unique(flat[order], return_index=True)
        self._ends = np.append(starts, len(flat))

    def find(self, conversation: Conversation) -> Leak | None:
        leaks = (self._search(text) for text in _near_texts(conversation, [conversation.messages]))
        return max((leak for leak in leaks if leak), key=lambda leak: leak.similarity, default=None)

    def _search(self, text: str) -> Leak | None:
        found = _without(shingles(text), self._common)
        places = np.minimum(np.searchsorted(self._values, found), max(len(self._values) - 1, 0))
        known = places[self._values[places] == found] if len(self._values) else places[:0]
        if not len(known) or len(known) < self._threshold * len(found):
            return None
        holders = np.concatenate([self._holders[self._ends[p] : self._ends[p + 1]] for p in known])
        shared = np.bincount(holders, minlength=len(self._sizes))
        similarity = shared / (self._sizes + len(found) - shared)
        best = int(similarity.argmax())
        if similarity[best] < self._threshold:
            return None
        return Leak(int(self._rows[best]), "near", float(similarity[best]))


def _near_texts(conversation: Conversation, wholes: Iterable[tuple[Message, ...]]) -> set[str]:
    return {_said(conversation.prompt), *(_said(messages) for messages in wholes)} - {""}
