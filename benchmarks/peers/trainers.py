"""The peers: transformers' Trainer with PEFT, TRL's SFTTrainer with and without Liger's kernels, and Unsloth's.

Each is set up as its own guide says, on the workload's samples in their order, and steps are told to a clock. What
differs from what a user would write: packed rows are the benchmark's own (found by the same rule), so that all train on
the same rows in the same order; and the attention of TRL's padding-free rows, `flash_attention_2`, is PyTorch's build
of those kernels (`varlen.py`), as there is no wheel of flash-attn.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from peers.bounds import RANK
from peers.models import config
from peers.workloads import Row, Sample, Step, Workload

SEED = 3407
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "falcon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "glm": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Peer:
    """How a peer trains. `half`: half the rows at a time, twice as often, to fit under a cap of memory."""

    trainer: str
    needs: tuple[str, ...]
    liger: bool = False
    checkpointing: bool = True
    half: bool = False

    def module(self, nf4: bool) -> tuple[str, ...]:
        """The modules it imports."""
        return (*self.needs, "bitsandbytes") if nf4 else self.needs


_TRL = ("peft", "accelerate", "datasets", "trl")
_LIGER, _UNSLOTH = (*_TRL, "liger_kernel"), (*_TRL, "unsloth", "xformers")
PEERS = {
    "transformers": Peer("transformers", ("peft", "accelerate")),
    "trl": Peer("trl", _TRL),
    "trl-off": Peer("trl", _TRL, checkpointing=False),
    "trl-liger": Peer("trl", _LIGER, liger=True),
    "trl-liger-off": Peer("trl", _LIGER, liger=True, checkpointing=False),
    "unsloth": Peer("unsloth", _UNSLOTH),
    "unsloth-off": Peer("unsloth", _UNSLOTH, checkpointing=False),
    "trl-liger-half": Peer("trl", _LIGER, liger=True, half=True),
    "trl-liger-off-half": Peer("trl", _LIGER, liger=True, checkpointing=False, half=True),
    "unsloth-half": Peer("unsloth", _UNSLOTH, half=True),
    "unsloth-off-half": Peer("unsloth", _UNSLOTH, checkpointing=False, half=True),
}


def peers_of(workload: Workload, memory: str) -> Iterator[str]:
    """Those that can do a workload. As they come, neither transformers nor TRL pack; Falcon has an attention of its
    own, which keeps no packed rows apart. Without checkpointing none fits into 8 GiB."""
    for name, peer in PEERS.items():
        packs = peer.trainer == "unsloth" or peer.liger
        falcon = workload.shape == "falcon-7b" and peer.liger
        fits = {"free": not peer.half, "8GiB": peer.checkpointing}.get(memory, True)
        if (packs or not workload.packed) and not falcon and fits:
            yield name


def train(name: str, folder: Path, workload: Workload, steps: list[Step], clock: Any) -> dict[str, Any]:
    """Runs the steps; returns the losses that were logged, and what shows that these were the steps."""
    from transformers import TrainerCallback

    class Ticking(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    peer, make = PEERS[name], {"transformers": _transformers, "trl": _trl, "unsloth": _unsloth}
    with tempfile.TemporaryDirectory() as place:
        options = _options(peer, workload, Path(place), clock.total)
        trainer = make[PEERS[name].trainer](peer, folder, workload, steps, options)
        if workload.packed:
            trainer.train_dataset = _rows_as(trainer.train_dataset.column_names, steps)
        seen = Seen(trainer, config(folder)["pad_token_id"])
        trainer.add_callback(Ticking())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    unlike = seen.unlike(steps[: clock.total], options["gradient_accumulation_steps"])
    return {"losses": losses, "unlike": unlike, "attention": _attention(peer)}


def _options(peer: Peer, workload: Workload, folder: Path, total: int) -> dict[str, Any]:
    """What all of transformers' descendants take."""
    import torch

    gpu, part = torch.cuda.is_available(), 2 if peer.half else 1
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": workload.micro // part,
        "gradient_accumulation_steps": workload.accumulate * part,
        "max_steps": total,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": gpu,
        "use_cpu": not gpu,
        "logging_steps": total,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "train_sampling_strategy": "sequential",
    }


def _transformers(peer: Peer, folder: Path, workload: Workload, steps: list[Step], options: dict[str, Any]) -> Any:
    """The recipe of many notebooks: PEFT's preparation for few bits, padded rows, all logits."""
    import peft
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, again = _base(folder), {"use_reentrant": False}
    if workload.nf4:
        model = peft.prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, gradient_checkpointing_kwargs=again
        )
    model = peft.get_peft_model(model, _lora(folder))
    rows: Any = [{"input_ids": sample.ids, "labels": _labels(sample)} for sample in _samples(steps)]
    arguments = TrainingArguments(**options, gradient_checkpointing=True, gradient_checkpointing_kwargs=again)
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder), padding=True)
    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)


def _trl(peer: Peer, folder: Path, workload: Workload, steps: list[Step], options: dict[str, Any]) -> Any:
    """As it comes, or with Liger's kernels and without padding."""
    from peers import varlen
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    model = _base(folder)
    chosen: dict[str, Any] = {"max_length": workload.longest, "packing": bool(workload.packed)}
    if peer.liger and workload.mix.shortest < workload.mix.longest:
        varlen.install(model)
        if not workload.packed:
            chosen |= {"padding_free": True, "max_length": None}  # the samples are cut already
    chosen |= {"gradient_checkpointing": peer.checkpointing, "use_liger_kernel": peer.liger}
    return SFTTrainer(
        model=model,
        args=SFTConfig(completion_only_loss=True, **options, **chosen),
        train_dataset=_completions(steps),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=_lora(folder),
    )


def _unsloth(peer: Peer, folder: Path, workload: Workload, steps: list[Step], options: dict[str, Any]) -> Any:
    """As it comes: it leaves padding out by itself, and keeps inputs of blocks in host memory."""
    import torch
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    from trl import SFTConfig, SFTTrainer  # isort: skip

    checkpointing = "unsloth" if peer.checkpointing else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=max(1024, workload.longest),
        dtype=torch.bfloat16,
        load_in_4bit=workload.nf4,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS[config(folder)["model_type"]],
        random_state=SEED,
        use_gradient_checkpointing=checkpointing,
    )
    chosen = {"max_length": workload.longest} | ({"packing": True} if workload.packed else {})
    chosen |= {} if peer.checkpointing else {"gradient_checkpointing": False}
    return SFTTrainer(
        model=model,
        args=SFTConfig(completion_only_loss=True, **options, **chosen),
        train_dataset=_completions(steps),
        processing_class=tokenizer,
    )


def _base(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    place = {"": 0} if torch.cuda.is_available() else None
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", device_map=place
    )
    model.config.use_cache = False
    return model


def _lora(folder: Path) -> Any:
    from peft import LoraConfig

    targets = TARGETS[config(folder)["model_type"]]
    return LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")


def _samples(steps: list[Step]) -> list[Sample]:
    return [sample for step in steps for row in step for sample in row]


def _labels(sample: Sample) -> list[int]:
    return [-100] * (len(sample.ids) - sample.learned) + sample.ids[len(sample.ids) - sample.learned :]


def _mask(sample: Sample) -> list[int]:
    return [0] * (len(sample.ids) - sample.learned) + [1] * sample.learned


def _completions(steps: list[Step]) -> Any:
    """The samples as both SFTTrainers read them: they make labels of the mask themselves."""
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": s.ids, "completion_mask": _mask(s)} for s in _samples(steps)])


def _rows_as(columns: list[str], steps: list[Step]) -> Any:
    """The benchmark's packed rows in the columns that the library's own packing made."""
    from datasets import Dataset

    def values(row: Row) -> dict[str, list[int]]:
        return {
            "input_ids": [i for sample in row for i in sample.ids],
            "labels": [i for sample in row for i in _labels(sample)],
            "completion_mask": [i for sample in row for i in _mask(sample)],
            "seq_lengths": [len(sample.ids) for sample in row],
        }

    rows = [values(row) for step in steps for row in step]
    return Dataset.from_list([{name: found for name, found in row.items() if name in columns} for row in rows])


class Seen:
    """What a trainer's batches hold, by their number of tokens and the sum of their ids, padding apart."""

    def __init__(self, trainer: Any, pad: int) -> None:
        self.pad, self.batches = pad, list[tuple[int, int]]()
        collator = trainer.data_collator
        if hasattr(collator, "torch_call"):
            self.inner, collator.torch_call = collator.torch_call, self
        else:
            self.inner, trainer.data_collator = collator, self

    def __call__(self, examples: Any, *others: Any, **named: Any) -> Any:
        batch = self.inner(examples, *others, **named)
        real = batch["input_ids"][batch["input_ids"] != self.pad]
        self.batches.append((real.numel(), int(real.sum())))
        return batch

    def unlike(self, steps: list[Step], accumulate: int) -> str:
        """Which step had other tokens than it should, or nothing."""
        for number, step in enumerate(steps):
            ids = [i for row in step for sample in row for i in sample.ids]
            found = self.batches[number * accumulate : (number + 1) * accumulate]
            tokens, total = sum(n for n, _ in found), sum(s for _, s in found)
            if (tokens, total) != (len(ids), sum(ids)):
                return f"step {number + 1} had {tokens} tokens and should have {len(ids)}"
        return ""


def _attention(peer: Peer) -> dict[str, bool]:
    """Which kernels Unsloth found: without xformers it is slower on packed rows, and the comparison worth less."""
    found = sys.modules.get("unsloth.utils.attention_dispatch")
    names = {"xformers": "HAS_XFORMERS", "flash": "HAS_FLASH_ATTENTION"}
    return {name: bool(getattr(found, flag, False)) for name, flag in names.items()} if found else {}


def first(name: str) -> None:
    """Imports what must come before all else."""
    if PEERS[name].trainer == "unsloth":
        import_module("unsloth")


def imported(name: str) -> None:
    """Imports all that a peer needs; transformers and TRL look for what is in them when it is asked for."""
    first(name)
    needs = PEERS[name].needs
    for module in needs:
        import_module(module)
    import_module("transformers").Trainer  # noqa: B018
    if "trl" in needs:
        import_module("trl").SFTTrainer  # noqa: B018
