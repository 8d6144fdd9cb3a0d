"""Memory and time of a run, from the recipe and the model's config alone: pure arithmetic, no weights, no torch.

The byte model counts what the fast block of `model/block.py` keeps per token and layer; the FLOP model is
2·P forward and 2·P backward for frozen weights (no weight gradient), as in the LoRA paper's setting
(Hu et al. 2021, section 4) with activations kept. Both are checked against measurements in `docs/log.md`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from luthier.errors import MemoryPlanError, ModelError
from luthier.machine import GIB, Machine
from luthier.recipe import Recipe

_PROCESS = 420 * 1024**2  # Python with torch and transformers imported, and the allocator's slack: measured
_SHARE = 0.8  # of the free memory that `memory: auto` takes: the rest is for the page cache and for other programs
_LOGIT_ROWS = 256  # rows of the head computed at once (kernels/loss.py)
_LONGEST_USEFUL = 4096  # tokens of a micro-batch beyond which a step on a CPU gets no faster

# Sustained FLOP/s of a training step per core, measured on SmolLM2-135M (docs/log.md), by dtype and instruction set.
_RATES = {
    ("bfloat16", "amx_bf16"): 200e9,
    ("bfloat16", "avx512_bf16"): 80e9,
    ("float32", "avx512f"): 60e9,
    ("float32", "avx2"): 30e9,
}
_SLOWEST = 10e9


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, read from its config. `linear` counts the weights of a layer's linear modules."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def linear(self) -> int:
        attention = 2 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.kv_heads * self.head_dim
        return attention + 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.linear + 2 * self.hidden) + embeddings + self.hidden

    def adapter(self, rank: int, targets: str | list[str]) -> int:
        """Trainable parameters of LoRA of `rank` on `targets`."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "q_proj": self.hidden + q,
            "k_proj": self.hidden + kv,
            "v_proj": self.hidden + kv,
            "o_proj": q + self.hidden,
            "gate_proj": self.hidden + self.intermediate,
            "up_proj": self.hidden + self.intermediate,
            "down_proj": self.intermediate + self.hidden,
        }
        chosen = sizes if targets == "all-linear" else {name: sizes[name] for name in targets if name in sizes}
        return self.layers * rank * sum(chosen.values())


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes are the whole machine's, over all processes; `parts` add up to `peak_bytes`."""

    parts: dict[str, int]
    peak_bytes: int
    budget_bytes: int
    fits: bool
    micro_tokens: int
    recompute: bool
    processes: int
    seconds_per_step: float
    advice: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def shape(config: dict[str, Any]) -> Shape:
    """The sizes in a Llama-family `config.json`. Raises ModelError naming the architecture if it is another one."""
    try:
        heads = int(config["num_attention_heads"])
        return Shape(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError) as error:
        kind = config.get("model_type", "unknown")
        raise ModelError(
            f"plan does not know the sizes of a '{kind}' model ({error})", fix="plan covers Llama-family models"
        ) from error


def parse_bytes(text: str) -> int:
    """`6GiB`, `512MiB`, `8GB` or a plain number, as bytes. Raises MemoryPlanError."""
    units = {"KiB": 1024, "MiB": 1024**2, "GiB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}
    number = text.strip().rstrip("KMGiBb ")
    try:
        return int(float(number) * units[text.strip()[len(number) :].strip()])
    except (ValueError, KeyError) as error:
        raise MemoryPlanError(f"'{text}' is not an amount of memory", fix="write e.g. 6GiB") from error


def budget(memory: str, facts: Machine) -> int:
    """Bytes a run may use: as the recipe says, else four fifths of what the machine has free."""
    return int(facts.available * _SHARE) if memory == "auto" else parse_bytes(memory)


def plan(
    recipe: Recipe,
    config: dict[str, Any],
    *,
    dtype: str,
    processes: int,
    threads: int,
    facts: Machine,
    longest: int | None = None,
    mean_length: float | None = None,
) -> Plan:
    """Predicts peak memory and the time of a step, and picks the micro-batch's tokens.

    Args:
        config: the model's `config.json`.
        dtype: "float32" or "bfloat16", the dtype of weights and activations.
        processes, threads: how the cores are used.
        longest, mean_length: tokens of the longest and of the mean row, where the data is known; else data.length.

    Returns a Plan whose `fits` is False where even one longest row a time, recomputed, exceeds the budget.
    """
    model, size = shape(config), 4 if dtype == "float32" else 2
    longest = min(longest or recipe.data.length, recipe.data.length)
    mean = min(mean_length or longest, longest)
    allowed = budget(recipe.run.memory, facts)
    rank = recipe.adapter.rank
    fixed = _fixed_parts(model, recipe, size)
    per_process = allowed / processes - sum(fixed.values())
    recompute = _recompute(recipe, model, size, longest, mean, rank, per_process)
    per_token = _token_bytes(model, size, longest, rank, recompute)
    if recipe.run.micro_tokens != "auto":
        tokens = recipe.run.micro_tokens
    else:
        step_tokens = int(recipe.train.samples_per_step * longest / processes) + longest
        tokens = max(longest, min(int(max(per_process, 0) / per_token), _LONGEST_USEFUL, step_tokens))
    parts = {name: amount * processes for name, amount in {**fixed, "activations": int(tokens * per_token)}.items()}
    peak = sum(parts.values())
    seconds = _step_flops(model, recipe, mean) * (4 / 3 if recompute else 1) / _rate(dtype, facts, processes * threads)
    advice = () if peak <= allowed else _advice(recipe, longest, recompute)
    return Plan(parts, peak, allowed, peak <= allowed, tokens, recompute, processes, seconds, advice)


def _fixed_parts(model: Shape, recipe: Recipe, size: int) -> dict[str, int]:
    """Bytes of one process that do not depend on the micro-batch."""
    adapter = model.adapter(recipe.adapter.rank, recipe.adapter.targets)
    return {
        "process": _PROCESS,
        "weights": model.weights * size,
        "adapter": adapter * (4 + size),
        "gradients": adapter * 4,
        "optimizer": adapter * 8,
        "logits": _LOGIT_ROWS * model.vocab * (4 + size),
    }


def _token_bytes(model: Shape, size: int, longest: int, rank: int, recompute: bool) -> int:
    """Bytes a token of a micro-batch holds at the peak.

    A layer keeps x, q, k, v, attention's output and probabilities, the middle residual, gate|up, and the adapters'
    inner products; with recompute only x. The backward pass of one layer adds about as much again, once.
    """
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    probabilities = model.heads * longest
    layer = size * (2 * model.hidden + 2 * q + 2 * kv + 2 * model.intermediate + 7 * rank + probabilities) + 16
    backward = size * (4 * model.hidden + 4 * model.intermediate + 2 * probabilities)
    kept = size * model.hidden * model.layers + layer if recompute else layer * model.layers
    return kept + backward


def _recompute(recipe: Recipe, model: Shape, size: int, longest: int, mean: float, rank: int, available: float) -> bool:
    """Recompute only where keeping activations would not leave room for the longest row."""
    if recipe.run.recompute != "auto":
        return recipe.run.recompute
    return available < longest * _token_bytes(model, size, longest, rank, recompute=False)


def _step_flops(model: Shape, recipe: Recipe, mean: float) -> float:
    """Forward and backward FLOPs of one step: 4 per frozen weight and token, 6 per adapter weight, attention
    2·d·s forward and 2.5 times that backward (causal half), and the head on the supervised share (taken as all)."""
    tokens = recipe.train.samples_per_step * mean
    adapter = model.adapter(recipe.adapter.rank, recipe.adapter.targets)
    attention = 3.5 * 2 * model.heads * model.head_dim * mean * model.layers
    head = 4 * model.hidden * model.vocab * 0.3
    return tokens * (4 * model.linear * model.layers + 6 * adapter + attention + head)


def _rate(dtype: str, facts: Machine, cores: int) -> float:
    """Sustained FLOP/s of a training step on `cores` cores of this kind."""
    known = [rate for (kind, flag), rate in _RATES.items() if kind == dtype and flag in facts.flags]
    return max([_SLOWEST, *known]) * min(cores, facts.cores)


def _advice(recipe: Recipe, longest: int, recompute: bool) -> tuple[str, ...]:
    offers = [f"shorten rows: data.length={max(64, longest // 2)}"]
    if recipe.run.engine != "local":
        offers.append("use one process: run.engine=local")
    if not recompute:
        offers.append("recompute activations: run.recompute=true")
    return tuple(offers)
