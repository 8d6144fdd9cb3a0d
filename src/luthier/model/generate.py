"""Answers to prompts: in batches for evaluation, token by token for a chat.

A row's answer depends on its own prompt, the sampling and the model: not on the rows it shares a batch with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.errors import MemoryPlanError, ModelError
from luthier.model.decode import Decoder, decoder
from luthier.model.fast import COLUMNS
from luthier.model.memory import attempt, release
from luthier.model.place import free_memory
from luthier.model.quantize import forget_unpacked

if TYPE_CHECKING:
    from luthier.model.causal import CausalModel

MAX_ROWS = 256  # more rows in one batch gain nothing on a CPU, and the logits of large vocabularies fill memory
LOOK_EVERY = 4  # steps of a GPU that are launched before the host waits for their tokens
LOGIT_BYTES = 32  # of each of a row's logits while a token is chosen: in float32, in float64 and sorted
MERGE_UP_TO = 2 << 30  # bytes of weights that may be copied to be merged; larger models run as they are
SHORTER = "shorten it, or close other programs"
SHORTER_OR_LESS = "shorten it, lower evaluate.generate.max_new_tokens, or close other programs"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the fields mean what they mean in transformers. `temperature` 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 17


@dataclass(frozen=True)
class Generation:
    """An answer: its tokens without the one that ended it, and whether one did (or the limit of tokens).

    `losses` are the negative log-likelihoods (nats) of the continuations that were given with the prompt."""

    ids: list[int]
    stopped: bool
    losses: tuple[float, ...] = ()


@torch.inference_mode()
def generate(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    *,
    continuations: Sequence[Sequence[Sequence[int]]] | None = None,
    max_tokens_in_flight: int | None = None,
    answered: Callable[[int, Generation], None] | None = None,
    where: Sequence[str] = (),
    fix: str = SHORTER,
) -> list[Generation]:
    """An answer to each prompt, in their order.

    Args:
        stop_ids: tokens that end an answer; never part of it.
        continuations: of each prompt, any number of texts that might follow it, at least a token each; their
            likelihoods come with the answer, and the prompt is read once for all. With `max_new_tokens` 0 nothing else
            is made.
        max_tokens_in_flight: tokens whose keys and values are held at a time; None: a quarter of the free memory, or
            half of a GPU's where our own decoder answers.
        answered: is given each answer when it is made, and the index of its prompt.
        where: of each prompt, the place that an error names.
        fix: what to do about a prompt that alone does not fit.

    Where memory runs out, recorded launches of training go first; then what is not answered yet is tried again, half as
    many rows at a time, and a row that is alone without unpacked weights beside it.

    Raises:
        ModelError: a prompt has no tokens.
        MemoryPlanError: one prompt alone does not fit.
    """
    if not all(prompts):
        raise ModelError("a prompt has no tokens", fix="choose a template that writes something before the answer")
    if not prompts:
        return []
    answers: dict[int, Generation] = {}
    size = sum(p.numel() * p.itemsize for p in model.module.parameters())
    engine = _decoder(model, merge=size <= MERGE_UP_TO)

    def answer(rows: Sequence[int]) -> bool:
        weighed = [continuations[i] for i in rows] if continuations else [[]] * len(rows)
        for row, one in _answer(engine, [prompts[i] for i in rows], weighed, sampling, stop_ids):
            answers[rows[row]] = one
            if answered:
                answered(rows[row], one)
        return True

    waiting = _planned(engine, model, [len(p) for p in prompts], sampling.max_new_tokens, max_tokens_in_flight)
    while waiting:
        rows, *waiting = waiting
        if attempt(partial(answer, rows)):
            continue
        most = _fewer(model, engine, len(rows))
        if most == 0:
            raise _too_long(len(prompts[rows[0]]), sampling.max_new_tokens, fix, where[rows[0]] if where else "")
        release()
        waiting = _cut([[row for row in rows if row not in answers], *waiting], most)
    return [answers[i] for i in range(len(prompts))]


def _decoder(model: CausalModel, *, merge: bool) -> Decoder:
    """`decoder`, with `merge` where there is memory for it. Raises MemoryPlanError where there is none at all."""
    for merges in (merge, False):
        found = attempt(partial(decoder, model, merge=merges))
        if found is not None:
            return found
        release()
    raise MemoryPlanError("the model leaves no memory for answers", fix="close other programs, or raise run.memory")


def _fewer(model: CausalModel, engine: Decoder, rows: int) -> int:
    """Lets go of what there need not be, after so many rows found no memory; how many to try now, or 0 where it is no
    use."""
    if model.forget_recorded():  # a run's, which has answers sampled
        return rows
    less = engine.take_less()
    return -(-rows // 2) if rows > 1 else int(less or forget_unpacked(model.module))


def _too_long(prompt: int, new_tokens: int, fix: str, where: str = "") -> MemoryPlanError:
    """`new_tokens` of its answer, or none."""
    read = f"a prompt of {prompt:,} tokens"
    both = f"{read} and up to {new_tokens:,} of its answer do not fit into memory by themselves"
    what = both if new_tokens else f"{read} does not fit into memory by itself"
    return MemoryPlanError(what, where=where, fix=fix)


def _cut(batches: Sequence[list[int]], most: int) -> list[list[int]]:
    """The same rows in the same order, at most so many together."""
    return [batch[start : start + most] for batch in batches for start in range(0, len(batch), most)]


def stream(
    model: CausalModel, prompt: Sequence[int], sampling: Sampling, stop_ids: frozenset[int], *, fix: str = SHORTER
) -> Iterator[int]:
    """The answer's tokens as they come, without the one that ends it. The same tokens as `generate` gives, and what it
    does where memory runs out. Raises MemoryPlanError where that is no use; `fix` is what to do then."""
    with torch.inference_mode():
        engine, pick = _decoder(model, merge=False), _Picker([prompt], sampling)
    said = list(prompt)
    read = partial(engine.prefill, [prompt], sampling.max_new_tokens)
    for left in range(sampling.max_new_tokens, 0, -1):
        with torch.inference_mode():  # not across a yield: it would hold in the caller
            while (ids := attempt(partial(_picked, pick, read))) is None:
                if not _fewer(model, engine, 1):
                    raise _too_long(len(prompt), sampling.max_new_tokens, fix)
                release()
                read = partial(engine.prefill, [said], left)
        token = int(ids)
        if token in stop_ids:
            return
        yield token
        said.append(token)
        read = partial(engine.step, ids)


def _picked(pick: _Picker, read: Callable[[], Tensor]) -> Tensor:
    return pick(read())


def _answer(
    engine: Decoder,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    sampling: Sampling,
    stop_ids: frozenset[int],
) -> Iterator[tuple[int, Generation]]:
    """(index, answer) of a batch of prompts, as they are finished."""
    made: dict[int, list[int]] = {i: [] for i in range(len(prompts))}  # of the unfinished
    rows = list(made)  # the prompt that each row of the decoder answers, finished or not
    logits = engine.prefill(prompts, sampling.max_new_tokens)
    losses = _weigh(engine, logits, continuations)
    pick = _Picker(prompts, sampling)
    unseen: list[Tensor] = []  # tokens that were chosen and not looked at
    for count in range(1, sampling.max_new_tokens + 1):
        unseen.append(pick(logits))
        if count < sampling.max_new_tokens and count % (LOOK_EVERY if engine.bucketed else 1):
            logits = engine.step(unseen[-1])
            continue
        for row, tokens in _ended(made, rows, unseen, stop_ids):
            yield row, Generation(tokens, True, losses[row])
        if not made or count == sampling.max_new_tokens:
            break
        ids, unseen = unseen[-1], []
        if len(rows) - len(made) >= len(rows) / 8:
            kept = _without_holes([row in made for row in rows])
            rows, index = [rows[i] for i in kept], torch.tensor(kept, device=ids.device)
            ids = ids[index]
            pick.keep(index)
            engine.keep(index)
        logits = engine.step(ids)
    yield from ((row, Generation(tokens, False, losses[row])) for row, tokens in made.items())


def _ended(
    made: dict[int, list[int]], rows: Sequence[int], steps: Sequence[Tensor], stop_ids: frozenset[int]
) -> Iterator[tuple[int, list[int]]]:
    """Adds the tokens of some steps to those that were made; takes out the rows that a stop token ends."""
    for ids in torch.stack(list(steps)).tolist():
        for row, token in zip(rows, ids, strict=True):
            if row in made and token in stop_ids:
                yield row, made.pop(row)
            elif row in made:
                made[row].append(token)


def _weigh(
    engine: Decoder, logits: Tensor, continuations: Sequence[Sequence[Sequence[int]]]
) -> list[tuple[float, ...]]:
    """Of each row the negative log-likelihoods of its continuations."""
    rows = [row for row, several in enumerate(continuations) for _ in several]
    flat = [one for several in continuations for one in several]
    losses = iter(engine.weigh(logits, rows, flat) if flat else ())
    return [tuple(islice(losses, len(several))) for several in continuations]


def _without_holes(alive: Sequence[bool]) -> list[int]:
    """Indices of the true ones, most of them where they are: the last fill the holes among the first."""
    count = sum(alive)
    tail = iter([i for i in range(count, len(alive)) if alive[i]])
    return [i if alive[i] else next(tail) for i in range(count)]


class _Picker:
    """Chooses the next token of each row from logits. Random numbers depend on the seed, the row's prompt and the
    step alone. A choice that finds no memory leaves it as it was."""

    def __init__(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        self.sampling = sampling
        self.step = 0
        self.seen: Tensor | None = None  # [B, V]: what the repetition penalty falls on
        self.noise: Tensor | None = None  # [B, max_new_tokens]
        self.prompts = prompts

    def __call__(self, logits: Tensor) -> Tensor:
        """fp32 [B, V] to int64 [B]."""
        if self.sampling.repetition_penalty != 1.0:
            logits = self._penalised(logits)
        if self.sampling.temperature:
            noise = self._drawn(logits.device)
            warm = logits.to(noise.device) / self.sampling.temperature
            ids = _sample(warm, self.sampling.top_p, noise[:, self.step]).to(logits.device)
        else:
            ids = logits.argmax(-1)
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        self.step += 1
        return ids

    def keep(self, rows: Tensor) -> None:
        self.noise = self.noise[rows.to(self.noise.device)] if self.noise is not None else None
        self.seen = self.seen[rows] if self.seen is not None else None

    def _drawn(self, device: torch.device) -> Tensor:
        """The random numbers of all steps. Apple's GPUs have no float64: there the choice is made on the CPU."""
        if self.noise is None:
            place = "cpu" if device.type == "mps" else device
            self.noise = torch.stack([_uniform(p, self.sampling) for p in self.prompts]).to(place)
        return self.noise

    def _penalised(self, logits: Tensor) -> Tensor:
        """Logits of tokens seen before, in the prompt or the answer, made less likely (arXiv:1909.05858)."""
        if self.seen is None:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in enumerate(self.prompts):
                seen[row, torch.tensor(prompt, device=logits.device)] = True
            self.seen = seen  # when it is whole: what finds no memory is tried again
        penalty = self.sampling.repetition_penalty
        return torch.where(self.seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _sample(logits: Tensor, top_p: float, noise: Tensor) -> Tensor:
    """One token of each row by inverting the distribution at `noise` [B], which is uniform in [0, 1)."""
    if top_p < 1.0:
        ascending, order = logits.sort(stable=True)
        beyond = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        beyond[:, -1] = False  # the likeliest token always stays
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)[:, 0]


def _uniform(prompt: Sequence[int], sampling: Sampling) -> Tensor:
    """fp64 [max_new_tokens] in [0, 1), of float32's resolution so that a product with 1 - epsilon stays below it."""
    words = b"".join(int(i).to_bytes(4, "little") for i in chain([sampling.seed & 0xFFFFFFFF], prompt))
    seed = int.from_bytes(hashlib.sha256(words).digest()[:8], "little", signed=True)
    return torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed)).double()


def _planned(
    engine: Decoder, model: CausalModel, lengths: Sequence[int], new_tokens: int, in_flight: int | None
) -> list[list[int]]:
    """Batches for which there is memory."""
    if engine.bucketed:
        budget = in_flight or _budget(model, 2)
        return _batches(lengths, new_tokens + _row_tokens(model), budget, len(lengths), equal=engine.equal)
    return _batches(lengths, new_tokens, in_flight or _budget(model, 4), equal=engine.equal)


def _batches(
    lengths: Sequence[int], new_tokens: int, budget: int, most: int = MAX_ROWS, *, equal: bool = False
) -> list[list[int]]:
    """Rows of similar length (of one length, if `equal`) together, longest first, so that memory is largest at once; a
    batch of n rows, at most `most`, holds n * (its longest prompt + new_tokens) tokens, within `budget` unless one row
    alone is longer.
    """
    batches: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) >= room or (equal and lengths[row] < lengths[batches[-1][0]]):
            batches.append([])
            room = min(most, budget // (lengths[row] + new_tokens))
        batches[-1].append(row)
    return batches


def _budget(model: CausalModel, part: int) -> int:
    """Tokens whose keys and values fill that part of the free memory: 4 is a quarter."""
    return max(1, free_memory(model.device, model.memory) // part // bytes_per_token(model))


def _row_tokens(model: CausalModel) -> int:
    """How many tokens' keys and values take the memory that a row takes beside its own: its logits, and the columns to
    which a GPU's cache is rounded up."""
    vocabulary: int = model.module.config.get_text_config().vocab_size
    return COLUMNS + LOGIT_BYTES * vocabulary // bytes_per_token(model)


def bytes_per_token(model: CausalModel) -> int:
    """Of keys and values; a family without attention heads keeps less, and is taken for one with as many as its
    hidden states are wide."""
    config = model.module.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    heads = _most(getattr(config, "num_attention_heads", None)) or 1
    width = getattr(config, "head_dim", None) or hidden // heads
    kept = _most(getattr(config, "num_key_value_heads", None)) or heads
    return int(2 * layers * kept * width * model.dtype.itemsize)


def _most(value: int | Sequence[int] | None) -> int | None:
    """Some configs count heads layer by layer."""
    return max(value) if isinstance(value, Sequence) else value
