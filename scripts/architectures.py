"""Every causal-LM architecture of the installed transformers, tiny and random, through luthier and through plain
transformers and PEFT: which train packed, which padded, which fail and why.

    make architectures [ONLY=llama,phi]

writes docs/reference/architectures.md and .jsonl; with ONLY, just those rows are made anew.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import toys  # noqa: E402
from luthier import recipe  # noqa: E402
from luthier.adapters import files  # noqa: E402
from luthier.adapters.linears import set_dense_weight  # noqa: E402
from luthier.data.stream import Micro  # noqa: E402
from luthier.errors import LuthierError  # noqa: E402
from luthier.model.causal import CausalModel, build  # noqa: E402

TABLE, ROWS = ROOT / "docs/reference/architectures.md", ROOT / "docs/reference/architectures.jsonl"
LIMIT = 120.0  # seconds for one architecture
LENGTHS, LR = (9, 23, 4, 14), 0.05
# fp32, of the whole tensor's norm: sums in another order, through a few layers. A leak between rows, a position counted
# on or a scale left out is off by 1e-2 and more.
TOLERANCE = 2e-4

# Why those fail that do, where more is known than how the check ends.
_AUDIO = "predicts several streams of audio codes at once, not text"
_DRAFT = "a draft head that reads the hidden states of a larger model, no language model by itself"
KNOWN = {
    "cpmant": "a prefix language model: all of its input is context, which every token sees",
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "laguna": "PEFT renames the tensors of the shared experts in the file, and leaves those layers without them",
    "musicgen": _AUDIO,
    "musicgen_melody": _AUDIO,
    "reformer": "its reversible layers pass no gradient to adapters under a frozen embedding, and its attention sorts "
    "whole rows by a random hash",
    "xlnet": "a permutation language model: in a plain forward pass every token sees both sides",
}


def names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class Disagreement(Exception):
    """Luthier and the reference are not the same."""


def check(name: str, folder: Path) -> dict[str, str]:
    """A row of the table. Raises what goes wrong."""
    base, batch = folder / "base", micro()
    toys.save(name, base)
    mine = attached(base, "all-linear")
    if not shares_weights(mine):
        with torch.no_grad():
            agree("logits", logits(mine, batch), by_rows(merged(plain(base), mine), batch))
    remarks = [] if mine.output is not None else ["logits by the module's own forward"]
    layers = list(adapter(mine).layers)
    readable = [layer for layer in layers if layer.rpartition(".")[2] not in taken(mine.module.config)]
    if len(readable) < len(layers):
        mine = attached(base, readable)
        remarks.append("PEFT takes the names of the dense MLP for those of the experts: compared without it")
    compare_training(mine, base, batch, folder)
    return {"name": name, "status": mine.layout, "reason": "; ".join(remarks)}


def compare_training(mine: CausalModel, base: Path, batch: Micro, folder: Path) -> None:
    """Two steps, a save and a reload, each held against PEFT on plain transformers."""
    from peft import PeftModel

    files.save(adapter(mine), folder / "start", base=str(base), revision=None, extra={})
    reference: Any = PeftModel.from_pretrained(plain(base), str(folder / "start"), is_trainable=True)
    compare_steps(mine, reference.eval(), batch)
    tuned = logits(mine, batch)
    files.save(adapter(mine), folder / "end", base=str(base), revision=None, extra={})
    spread(mine)
    adapter(mine).load_state_dict(files.load(folder / "end")[1])
    agree("logits after reloading", logits(mine, batch), tuned)
    reference.load_adapter(str(folder / "end"), adapter_name="end")
    reference.set_adapter("end")
    with torch.no_grad():
        agree("logits of PEFT on the saved file", by_rows(reference, batch), tuned)


def plain(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def shares_weights(mine: CausalModel) -> bool:
    """Whether layers with adapters of their own have one weight, so that no merged weight can do what they do."""
    layers = adapter(mine).layers.values()
    return len({layer.base.weight.data_ptr() for layer in layers}) < len(layers)


def merged(module: Any, mine: CausalModel) -> Any:
    """The updates of `mine` added into the weights of `module`."""
    for layer, update in adapter(mine).layers.items():
        set_dense_weight(module.get_submodule(layer), update.merged())
    return module


def taken(config: Any) -> Sequence[str]:
    """Names of layers that PEFT gives another meaning: since transformers fused the linear layers of experts into one
    parameter, it reads them as the experts', also where a dense layer is called so."""
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(config.model_type)
    return tuple(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))


def adapter(model: CausalModel) -> Any:
    assert model.adapter is not None
    return model.adapter


def attached(base: Path, targets: str | list[str]) -> CausalModel:
    """With an adapter away from its start, where the update is zero and A has no gradient."""
    model, lora = recipe.Model(base=str(base)), recipe.Lora(rank=4, alpha=8, targets=targets)
    options: dict[str, Any] = {"kernels": "reference", "recompute": False, "seed": 3}
    made = build(model, lora, folder=base, device=torch.device("cpu"), dtype=torch.float32, **options)
    spread(made)
    return made


def spread(model: CausalModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter(model).parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def micro() -> Micro:
    """Random rows, of which half the tokens are learned."""
    bounds = (0, *torch.tensor(LENGTHS).cumsum(0).tolist())
    ids = torch.randint(8, toys.VOCAB, (bounds[-1],), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    learned = ((positions > 0) & ((ids % 2 == 0) | (positions == 2))).nonzero()[:, 0]
    return Micro(ids, positions, bounds, learned - 1, ids[learned], torch.arange(len(LENGTHS)), step=0)


def logits(model: CausalModel, batch: Micro) -> Tensor:
    with torch.no_grad():
        return model.head.logits(model.hidden(batch))


def by_rows(module: Any, batch: Micro) -> Tensor:
    """The logits of each row alone, at its supervised places."""
    found = []
    for start, end in pairwise(batch.bounds):
        rows = batch.rows[(batch.rows >= start) & (batch.rows < end)] - start
        found.append(module(input_ids=batch.ids[None, start:end], **cacheless(module)).logits[0, rows].float())
    return torch.cat(found)


def cacheless(module: Any) -> dict[str, Any]:
    """A PEFT model takes any keyword and hands it on."""
    inner = getattr(module, "base_model", module)
    forward = getattr(inner, "model", module).forward if hasattr(module, "peft_config") else module.forward
    return {"use_cache": False} if "use_cache" in inspect.signature(forward).parameters else {}


def compare_steps(mine: CausalModel, reference: Any, batch: Micro) -> None:
    """Two steps of each, by the same rule, held against each other: losses and gradients."""
    theirs = {n.replace(".default.weight", ".weight"): p for n, p in reference.named_parameters() if p.requires_grad}
    ours = dict(adapter(mine).named_parameters())
    if ours.keys() != theirs.keys():
        raise Disagreement(f"PEFT trains {len(theirs)} tensors, luthier {len(ours)}")
    for number in (1, 2):
        loss = mine.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        wanted = F.cross_entropy(by_rows(reference, batch), batch.targets, reduction="sum")
        wanted.backward()  # type: ignore[no-untyped-call]
        agree(f"loss of step {number}", loss.detach(), wanted.detach())
        made, right = (torch.cat([gradient(group[n]).flatten() for n in sorted(ours)]) for group in (ours, theirs))
        if not right.any():
            raise Disagreement("no gradient reaches the adapter")
        agree(f"gradients of step {number}", made, right, slack=5)
        for parameter in (*ours.values(), *theirs.values()):
            parameter.data.sub_(gradient(parameter), alpha=LR / len(batch.targets))
            parameter.grad = None


def gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def agree(what: str, made: Tensor, right: Tensor, slack: float = 1) -> None:
    distance = float(((made - right).norm() / right.norm()).detach())
    if not distance <= slack * TOLERANCE:
        raise Disagreement(f"{what} differ by {distance:.1e}")


def row(name: str, limit: float) -> dict[str, str]:
    """`check` in a process of its own, that can take no longer than `limit` seconds."""
    mine, other = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_in_process, args=(name, other))
    process.start()
    other.close()
    try:
        made: dict[str, str] = mine.recv() if mine.poll(limit) else _failed(name, f"takes longer than {limit:.0f} s")
    except EOFError:
        made = _failed(name, "the process ended")
    process.kill()
    process.join()
    return made


def _in_process(name: str, pipe: Any) -> None:
    quiet()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = check(name, Path(folder))
    except (Exception, SystemExit) as error:
        if VERBOSE:
            traceback.print_exc()
        kind = "" if isinstance(error, LuthierError | Disagreement) else f"{type(error).__name__}: "
        made = _failed(name, f"{kind}{error}")
    pipe.send(made)


def warm() -> None:
    """Imports here what every process would import anew."""
    quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("afmoe", "llama"):
            check(name, Path(folder) / name)


def quiet() -> None:
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _failed(name: str, reason: str) -> dict[str, str]:
    reason = KNOWN.get(name, " ".join(reason.split())[:300])
    return {"name": name, "status": "fails", "reason": reason}


VERBOSE = False


def main() -> int:
    global VERBOSE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names, with commas between them")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--verbose", action="store_true")
    asked = parser.parse_args()
    VERBOSE = asked.verbose
    chosen = [n for n in asked.only.split(",") if n] or names()
    began, made = time.monotonic(), {}
    warm()
    with ThreadPoolExecutor(asked.processes) as pool:
        for done in pool.map(lambda name: row(name, LIMIT), chosen):
            made[done["name"]] = done
            print(f"{done['name']:32} {done['status']:8} {done['reason']}", flush=True)
    kept = {} if not asked.only or not ROWS.exists() else {r["name"]: r for r in map(json.loads, ROWS.open())}
    write([{**kept, **made}[name] for name in names() if name in {**kept, **made}])
    print(f"{time.monotonic() - began:.0f} s")
    return 0


def write(rows: Sequence[dict[str, str]]) -> None:
    import transformers

    ROWS.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    counts = Counter(r["status"] for r in rows)
    passing = (counts["packed"] + counts["padded"]) / len(rows)
    lines = [
        "# Architectures",
        "",
        f"*Generated by `make architectures` with transformers {transformers.__version__} and torch "
        f"{torch.__version__}; do not edit.*",
        "",
        f"{counts['packed']} architectures train packed, {counts['padded']} padded, {counts['fails']} not: "
        f"{passing:.0%} of {len(rows)} pass.",
        "",
        "Each is built tiny and with random weights, gets LoRA on all linear layers, trains two steps, and is saved "
        "and reloaded. Losses, gradients and logits have to be those of plain transformers, row by row and unpacked, "
        f"with PEFT's adapter read from luthier's file: in float32, to {TOLERANCE:.0e} of their norm (gradients: five "
        "times that).",
        "",
        "*packed*: rows lie one after another and nothing is padded. *padded*: the family's code mixes rows that lie "
        "one after another, so rows of like length make a rectangle, at least three quarters full. Which of the two "
        "is found by a probe on the model itself.",
        "",
        "| architecture | status | remark |",
        "| --- | --- | --- |",
        *(f"| `{r['name']}` | {r['status']} | {r['reason'].replace('|', '/')} |" for r in rows),
    ]
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
