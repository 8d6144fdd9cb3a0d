"""One optimiser step of LoRA fine-tuning on a CPU: luthier beside TRL as it comes, and beside the best of its parts.

    python benchmarks/cpu_step.py --threads 1 --rounds 5 --json

Needs torch, transformers, peft, trl, datasets and luthier (`pip install luthier[bench]`). Every peer is a process of
its own with the same weights, the same LoRA start values, the same samples and the same optimiser (AdamW, gradients
clipped at 1.0). Steps are interleaved: each round, each peer does one step while the others sleep. Peers:

    default       the real `SFTTrainer.train()` with TRL's defaults (padded, bf16 autocast, gradient checkpointing)
    default_fp32  the same with `bf16=False`, for processors on which bf16 is slow
    tuned         transformers + PEFT as well as they go: packed, no checkpointing, head on supervised rows only, fused
                  AdamW, the best of {bf16, fp32} x {sdpa, eager} attention x {512, all} tokens a pass on this machine,
                  found by timing
    luthier_eager, luthier_compiled   our block without and with a C++ compiler's help

Before a time counts, a peer passes the parity gates: its first loss is within 2e-3 of an fp32 reference that runs
sample by sample, and its clipped LoRA gradient is no further from the reference's than 1.2 times the worst of its
peers' (relative L2).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PEERS = ("default", "default_fp32", "tuned", "luthier_eager", "luthier_compiled")
SMALL_PASS, LARGE_PASS = 512, 1 << 20  # tokens
RANK, ALPHA, MAX_NORM, RATE = 16, 32, 1.0, 2e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOSS_GATE, GRADIENT_GATE, ROUNDING = 2e-3, 1.2, 2e-5  # ROUNDING: what fp32 itself leaves of a gradient after 30 layers


# ------------------------------------------------------------------------------------------------ workload
def make_workload(folder: Path, options: argparse.Namespace, supervised: float) -> None:
    """Samples of log-normal length (sigma 0.7) whose last `supervised` share carries loss, and LoRA start values."""
    import numpy as np

    rng = np.random.default_rng(7)
    lengths = rng.lognormal(0, 0.7, size=(options.rounds + options.warmup, options.samples))
    lengths = np.clip(lengths / lengths.mean() * options.mean, 16, 1024).astype(int)
    prefix = rng.integers(3, 49152, size=options.prefix).tolist()
    steps = []
    for row in lengths:
        texts = [[*prefix, *rng.integers(3, 49152, size=max(8, n - len(prefix))).tolist()] for n in row]
        learned = [max(1, round(len(t) * supervised)) for t in texts]
        steps.append([{"ids": t, "first": max(1, len(t) - n)} for t, n in zip(texts, learned, strict=True)])
    (folder / "steps.json").write_text(json.dumps(steps))


def make_model(folder: Path) -> None:
    """A model of SmolLM2-135M's shape with random weights, and LoRA start values for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def find_model(choice: str, folder: Path) -> Path:
    from luthier.machine import cache_folder
    from luthier.model import embedded

    cached = cache_folder() / f"{embedded.NAME}-{embedded.CONVERSION}"
    if choice == "auto" and (cached / "model.safetensors").exists():
        return cached
    if choice not in ("auto", "random"):
        return Path(choice)
    make_model(folder / "model")
    return folder / "model"


def start_values(name: str, shape: tuple[int, ...]) -> Any:
    """The same LoRA start for every peer, from the tensor's PEFT name: B is not zero, so A has a gradient at once."""
    import zlib

    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * (0.02 if "lora_B" in name else shape[-1] ** -0.5)


# ------------------------------------------------------------------------------------------------ peers (in workers)
class Peer:
    """A training set-up: `step(samples)` does one optimiser step and returns the loss."""

    named: dict[str, Any]  # PEFT name -> parameter

    def step(self, samples: list[dict[str, Any]]) -> float:
        raise NotImplementedError

    def start(self) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(start_values(name, tuple(parameter.shape)))

    def gradient(self) -> Any:
        """The clipped gradient, flat, in the order of names."""
        import torch

        return torch.cat([self.named[n].grad.float().flatten() for n in sorted(self.named)]).numpy()


def peft_model(folder: Path, dtype: Any, attention: str = "sdpa") -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"))


def lora_parameters(model: Any) -> dict[str, Any]:
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}


class Tuned(Peer):
    """transformers + PEFT, packed, at most `budget` tokens a pass; `amp` multiplies in bf16, with weights in bf16."""

    def __init__(self, folder: Path, amp: bool, attention: str, budget: int) -> None:
        import torch

        self.amp, self.budget = amp, budget
        self.model = peft_model(folder, torch.bfloat16 if amp else torch.float32, attention)
        self.model.train()
        self.named = lora_parameters(self.model)
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=RATE, weight_decay=0.0, fused=True)

    def step(self, samples: list[dict[str, Any]]) -> float:
        from luthier.data.packing import micro_batches

        self.optimizer.zero_grad(set_to_none=True)
        total, targets = 0.0, sum(len(s["ids"]) - s["first"] for s in samples)
        for rows in micro_batches([len(s["ids"]) for s in samples], self.budget):
            loss = self.loss([samples[row] for row in rows]) / targets
            loss.backward()
            total += loss.item()
        clip_and_update(self.named, self.optimizer)
        return total

    def loss(self, samples: list[dict[str, Any]]) -> Any:
        import torch
        import torch.nn.functional as F

        ids, positions, rows, targets = pack(samples)
        base = self.model.base_model.model
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.amp):
            hidden = base.model(input_ids=ids[None], position_ids=positions[None], use_cache=False)[0][0]
            logits = base.lm_head(hidden[rows])
        return F.cross_entropy(logits.float(), targets, reduction="sum")


class Luthier(Peer):
    """Our step. With several processes each takes a share of the samples and gradients are summed over gloo."""

    def __init__(self, folder: Path, kernels: Any, options: argparse.Namespace) -> None:
        import torch
        import torch.distributed as dist

        from luthier import recipe
        from luthier.model.causal import build

        self.model = build(
            recipe.Model(base=str(folder)),
            recipe.Lora(rank=RANK, alpha=ALPHA),
            folder=folder,
            kernels=kernels,
            recompute=options.recompute,
            seed=0,
            device=torch.device("cpu"),
            dtype=dtype_of(options.dtype),
        )
        self.rank, self.ranks = options.rank, options.processes
        if self.ranks > 1:
            store = Path(options.folder) / f"store-{options.worker}"
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=self.rank, world_size=self.ranks)
        assert self.model.adapter is not None
        layers = self.model.adapter.layers
        self.named = {f"base_model.model.{n}.lora_A.weight": layer.A for n, layer in layers.items()}
        self.named |= {f"base_model.model.{n}.lora_B.weight": layer.B for n, layer in layers.items()}
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=RATE, weight_decay=0.0, fused=True)

    def step(self, samples: list[dict[str, Any]]) -> float:
        import torch
        import torch.distributed as dist

        from luthier.data.packing import share
        from luthier.data.stream import Micro

        total = sum(len(s["ids"]) - s["first"] for s in samples)
        mine = [samples[i] for i in share([len(s["ids"]) for s in samples], self.ranks)[self.rank]]
        ids, positions, rows, targets = pack(mine)
        bounds = (0, *torch.tensor([len(s["ids"]) for s in mine]).cumsum(0).tolist())
        micro = Micro(ids, positions, bounds, rows, targets, torch.arange(len(mine)), 0)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.loss(micro) / total
        loss.backward()  # type: ignore[no-untyped-call]
        loss = loss.detach()
        if self.ranks > 1:
            gradients = [p.grad for p in self.named.values()]
            flat = torch.cat([*(g.flatten() for g in gradients), loss[None]])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients] + [1])[:-1], strict=True):
                gradient.copy_(part.view_as(gradient))
            loss = flat[-1]
        clip_and_update(self.named, self.optimizer)
        return float(loss)


def pack(samples: list[dict[str, Any]]) -> tuple[Any, Any, Any, Any]:
    """ids, positions, rows with a supervised next token, and those tokens, of the samples one after the other."""
    import torch

    ids = torch.tensor([i for s in samples for i in s["ids"]])
    positions = torch.tensor([p for s in samples for p in range(len(s["ids"]))])
    first = torch.tensor([s["first"] for s in samples for _ in s["ids"]])
    learned = (positions >= first).nonzero()[:, 0]
    return ids, positions, learned - 1, ids[learned]


def clip_and_update(named: dict[str, Any], optimizer: Any) -> None:
    import torch

    torch.nn.utils.clip_grad_norm_(list(named.values()), MAX_NORM)
    optimizer.step()


# ------------------------------------------------------------------------------------------------ worker process
class Worker:
    """A peer's side of the pipe: reads `step`, does one, answers with a line of JSON."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder, self.name = Path(options.folder), options.worker
        self.steps = json.loads((self.folder / "steps.json").read_text())
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to stderr

    def say(self, **values: Any) -> None:
        self.out.write(json.dumps(values) + "\n")
        self.out.flush()

    def wait(self) -> bool:
        return sys.stdin.readline().strip() == "step"

    def serve(self, peer: Peer, first_gradient: bool = True) -> None:
        peer.start()
        self.say(ready=True)
        reset_peak()
        for number, samples in enumerate(self.steps):
            if not self.wait():
                return
            with Stopwatch() as times:
                loss = peer.step(samples)
            if number == 0 and first_gradient:
                self.keep(peer)
            self.say(loss=loss, peak=peak_bytes(), **times)

    def keep(self, peer: Peer) -> None:
        import numpy as np

        np.save(self.folder / f"gradient-{self.name}.npy", peer.gradient())


class Stopwatch:
    """CPU seconds of this process and its children, and wall seconds."""

    def __enter__(self) -> dict[str, float]:
        self.times: dict[str, float] = {}
        self.cpu, self.wall = cpu_seconds(), time.perf_counter()
        return self.times

    def __exit__(self, *_: object) -> None:
        self.times |= {"cpu": cpu_seconds() - self.cpu, "wall": time.perf_counter() - self.wall}


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def reset_peak() -> None:
    """Forgets the peak of loading and importing, where the system lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak includes loading", file=sys.stderr)


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def serve_trl(worker: Worker, model_folder: Path, bf16: bool) -> None:
    """Runs the real `SFTTrainer.train()`; a callback holds it before every step until the parent says so."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        bos_token="<s>", eos_token="</s>", pad_token="</s>",
    )  # fmt: skip
    samples = [s for step in worker.steps for s in step]
    rows = [{"input_ids": s["ids"], "labels": [-100] * s["first"] + s["ids"][s["first"] :]} for s in samples]
    arguments = SFTConfig(
        output_dir=str(worker.folder / "trl"),
        use_cpu=True,
        bf16=bf16,
        per_device_train_batch_size=len(worker.steps[0]),
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    class Held(TrainerCallback):  # type: ignore[misc]
        watch: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not worker.wait():
                os._exit(0)
            self.watch = Stopwatch()
            self.times = self.watch.__enter__()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:  # not counted: writing the gradient is our doing
                before = cpu_seconds(), time.perf_counter()
                worker.keep(peer)
                self.watch.cpu += cpu_seconds() - before[0]
                self.watch.wall += time.perf_counter() - before[1]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.watch.__exit__()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                worker.say(loss=float(logs["loss"]), peak=peak_bytes(), **self.times)

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32"),  # TRL's default dtype
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[Held()],
    )
    peer = Peer()
    peer.named = lora_parameters(trainer.model)
    peer.start()
    worker.say(ready=True)
    reset_peak()
    trainer.train()


def serve_tuned(worker: Worker, model_folder: Path, setting: str) -> None:
    if not setting:
        setting = best_setting(worker, model_folder)
        worker.say(setting=setting)
        # Start afresh, so that what was tried and not taken does not count as memory.
        os.dup2(worker.out.fileno(), 1)
        os.execv(sys.executable, [sys.executable, *sys.argv, "--setting", setting])
    worker.serve(tuned(model_folder, setting))


def tuned(model_folder: Path, setting: str) -> Tuned:
    dtype, attention, budget = setting.split()
    return Tuned(model_folder, dtype == "bf16", attention, int(budget))


def best_setting(worker: Worker, model_folder: Path) -> str:
    """The quickest setting on this machine: dtype and attention in small passes first, then the larger pass."""
    small = [f"{dtype} {attention} {SMALL_PASS}" for dtype in ("bf16", "fp32") for attention in ("sdpa", "eager")]
    best = min(small, key=lambda setting: trial(worker, model_folder, setting))
    large = best.rpartition(" ")[0] + f" {LARGE_PASS}"
    return min((best, large), key=lambda setting: trial(worker, model_folder, setting))


def trial(worker: Worker, model_folder: Path, setting: str) -> float:
    """CPU seconds of the first step after a warm-up. Half of it would favour large passes, whose cost grows faster."""
    peer = tuned(model_folder, setting)
    samples = worker.steps[0]
    peer.step(samples[:2])
    with Stopwatch() as times:
        peer.step(samples)
    return times["cpu"]


def work(options: argparse.Namespace) -> None:
    import torch

    ours = options.worker.startswith("luthier")
    torch.set_num_threads(max(1, options.threads // options.processes) if ours else options.threads)
    worker, model_folder = Worker(options), Path(options.model)
    if options.worker in ("default", "default_fp32"):
        serve_trl(worker, model_folder, bf16=options.worker == "default")
    elif options.worker == "tuned":
        serve_tuned(worker, model_folder, options.setting)
    elif options.worker == "reference":
        worker.serve(Tuned(model_folder, amp=False, attention="sdpa", budget=1))  # fp32, one sample at a time
    else:
        peer = Luthier(model_folder, options.worker.removeprefix("luthier_"), options)
        worker.serve(peer, first_gradient=options.rank == 0)


def dtype_of(name: str) -> Any:
    import torch

    from luthier.machine import machine
    from luthier.model.load import dtype_name

    if name == "auto":
        return getattr(torch, dtype_name("auto", "cpu", machine())[0])
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


# ------------------------------------------------------------------------------------------------ parent process
class Remote:
    """The parent's side of one peer's processes."""

    def __init__(self, name: str, folder: Path, model: Path, options: argparse.Namespace) -> None:
        self.name, self.setting, self.steps = name, "", []
        ranks = range(options.processes if name.startswith("luthier") else 1)
        command = [sys.executable, __file__, "--worker", name, "--folder", str(folder), "--model", str(model)]
        command += ["--threads", str(options.threads), "--processes", str(options.processes), "--dtype", options.dtype]
        command += ["--recompute"] if options.recompute else []
        # Threads that wait must not burn the CPU time that is measured.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}
        log = (folder / f"{name}.log").open("w")
        self.processes = [
            subprocess.Popen(
                [*command, "--rank", str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment,
            )
            for rank in ranks
        ]  # fmt: skip
        for process in self.processes:
            while "ready" not in (answer := self.read(process, folder)):
                self.setting = answer["setting"]

    def read(self, process: Any, folder: Path) -> dict[str, Any]:
        line = process.stdout.readline()
        if not line:
            tail = (folder / f"{self.name}.log").read_text()[-3000:]
            raise SystemExit(f"peer {self.name} ended early:\n{tail}")
        return json.loads(line)  # type: ignore[no-any-return]

    def step(self, folder: Path) -> None:
        """One step on all of the peer's processes: CPU and peaks are sums, the wall is the slowest's."""
        for process in self.processes:
            process.stdin.write("step\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        answers = [self.read(process, folder) for process in self.processes]
        self.steps.append(
            {
                "loss": answers[0]["loss"],
                "cpu": sum(a["cpu"] for a in answers),
                "wall": max(a["wall"] for a in answers),
                "peak": sum(a["peak"] for a in answers),
            }
        )

    def stop(self) -> None:
        for process in self.processes:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()


def measure(supervised: float, peers: list[str], model: Path, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="cpu_step_") as place:
        folder = Path(place)
        make_workload(folder, options, supervised)
        reference = Remote("reference", folder, model, options)
        reference.step(folder)
        reference.stop()
        remotes = [Remote(name, folder, model, options) for name in peers]
        for number in range(options.warmup + options.rounds):
            for remote in remotes if number % 2 else reversed(remotes):
                remote.step(folder)
            print(
                f"  step {number}: " + "  ".join(f"{r.name} {r.steps[-1]['cpu']:.2f}" for r in remotes), file=sys.stderr
            )
        for remote in remotes:
            remote.stop()
        steps = json.loads((folder / "steps.json").read_text())
        tokens = statistics.mean(sum(len(s["ids"]) for s in step) for step in steps[options.warmup :])
        rows = {r.name: summary(r, remotes, options) | parity(r, reference, folder) for r in remotes}
    return {"supervised": supervised, "tokens_per_step": round(tokens), "peers": gate(rows)}


def summary(remote: Remote, remotes: list[Remote], options: argparse.Namespace) -> dict[str, Any]:
    """Medians, and paired ratios: each round every peer did the same samples."""
    kept = remote.steps[options.warmup :]
    row: dict[str, Any] = {
        "cpu_s": statistics.median(s["cpu"] for s in kept),
        "wall_s": statistics.median(s["wall"] for s in kept),
        "first_step_s": remote.steps[0]["wall"],
        "peak_gib": max(s["peak"] for s in kept) / 2**30,
    }
    row |= {"setting": remote.setting} if remote.setting else {}
    for other in remotes:
        if other is not remote and remote.name.startswith("luthier"):
            for kind in ("cpu", "wall"):
                pairs = zip(other.steps[options.warmup :], kept, strict=True)
                row[f"{kind}_ratio_{other.name}"] = spread([theirs[kind] / mine[kind] for theirs, mine in pairs])
    return row


def spread(ratios: list[float]) -> dict[str, float]:
    ordered = sorted(ratios)
    return {"median": statistics.median(ordered), "low": ordered[0], "high": ordered[-1]}


def parity(remote: Remote, reference: Remote, folder: Path) -> dict[str, float]:
    import numpy as np

    truth = np.load(folder / "gradient-reference.npy")
    error = np.linalg.norm(np.load(folder / f"gradient-{remote.name}.npy") - truth) / np.linalg.norm(truth)
    loss = reference.steps[0]["loss"]
    return {"loss_error": abs(remote.steps[0]["loss"] - loss) / loss, "gradient_error": float(error)}


def gate(rows: dict[str, Any]) -> dict[str, Any]:
    allowed = max(
        GRADIENT_GATE * max(r["gradient_error"] for n, r in rows.items() if n in ("tuned", "default")), ROUNDING
    )
    for row in rows.values():
        row["passed"] = row["loss_error"] <= LOSS_GATE and row["gradient_error"] <= allowed
    return rows


def headline(workload: dict[str, Any], name: str) -> float | None:
    """The median CPU ratio of our best kernels that passed, against a peer."""
    ratios = [
        row[f"cpu_ratio_{name}"]["median"]
        for row in workload["peers"].values()
        if row["passed"] and f"cpu_ratio_{name}" in row
    ]
    return max(ratios, default=None)


def environment() -> dict[str, Any]:
    from importlib.metadata import version

    from luthier import __version__

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    return {
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "features": sorted(flags & {"avx512f", "avx512_bf16", "amx_bf16"}),
        "compiler": bool(compiler()),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
        | {"luthier": __version__},
    }


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def main() -> None:
    options = arguments()
    if options.worker:
        work(options)
        return
    peers = options.peers.split(",")
    if not compiler():
        peers = [p for p in peers if p != "luthier_compiled"]
    machine = environment()
    with tempfile.TemporaryDirectory(prefix="cpu_step_model_") as place:
        model = find_model(options.model, Path(place))
        workloads = [measure(float(share), peers, model, options) for share in options.supervised.split(",")]
    result = {
        "ratio_default": headline(workloads[0], "default"),
        "ratio_tuned": headline(workloads[0], "tuned"),
        "parity": all(row["passed"] for w in workloads for name, row in w["peers"].items() if "luthier" in name),
        "workloads": workloads,
        "environment": machine,
        "options": {k: v for k, v in vars(options).items() if k not in ("worker", "folder", "rank", "setting")},
    }
    print(json.dumps(result, indent=1) if options.json else table(result))


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['environment']['cpu']} {result['environment']['features']} {result['environment']['versions']}"]
    for workload in result["workloads"]:
        lines.append(f"\n{workload['supervised']:.0%} supervised, {workload['tokens_per_step']} tokens a step")
        lines.append(
            f"{'peer':18} {'cpu s':>7} {'wall s':>7} {'GiB':>6} {'loss err':>9} {'grad err':>9}  cpu ratios [low, high]"
        )
        for name, row in workload["peers"].items():
            ratios = [(k[10:], v) for k, v in row.items() if k.startswith("cpu_ratio") and "luthier" not in k]
            shown = "  ".join(f"{k} {v['median']:.2f} [{v['low']:.2f}, {v['high']:.2f}]" for k, v in ratios)
            shown += row.get("setting", "") + ("" if row["passed"] else "  FAILED PARITY")
            lines.append(
                f"{name:18} {row['cpu_s']:7.2f} {row['wall_s']:7.2f} {row['peak_gib']:6.2f} {row['loss_error']:9.1e} "
                f"{row['gradient_error']:9.1e}  {shown}"
            )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of each peer (shared by luthier's processes)")
    parser.add_argument("--processes", type=int, default=1, help="processes of luthier, their gradients summed")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="luthier's dtype")
    parser.add_argument("--recompute", action="store_true", help="luthier recomputes its layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not counted")
    parser.add_argument("--samples", type=int, default=8, help="samples of a step")
    parser.add_argument("--mean", type=float, default=172, help="mean length in tokens")
    parser.add_argument("--prefix", type=int, default=0, help="leading tokens that all samples share")
    parser.add_argument("--supervised", default="0.15,1.0", help="shares of supervised tokens, one workload each")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument(
        "--model", default="auto", help="auto (the cached embedded model, else random), random, or a folder"
    )
    parser.add_argument("--json", action="store_true")
    for hidden, kind in (("--worker", str), ("--folder", str), ("--rank", int), ("--setting", str)):
        parser.add_argument(hidden, type=kind, default=kind(), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
