"""The recipe: everything a run depends on, as a frozen typed tree.

Two halves. `model`, `adapter`, `data`, `train`, `evaluate` say *what is learned*: a change there is another experiment.
`run` says *how it is run*: a change there leaves the loss curve where it is. Unknown keys are errors with the nearest
name; validation never edits; what follows from the recipe (a run folder's name, a schedule) is computed by functions.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from luthier.errors import RecipeError, UsageError
from luthier.registry import nearest, nearest_path


class Section(BaseModel):
    """Base of every part of the tree: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


_SHIPPED = Path(__file__).parent / "recipes"

# What other tools call our keys: an unknown key of theirs is answered with ours.
_ELSEWHERE = {
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "per_device_train_batch_size": "train.samples_per_step",
    "micro_batch_size": "train.samples_per_step",
    "batch_size": "train.samples_per_step",
    "gradient_accumulation_steps": "train.samples_per_step (a step is a number of samples, however it is cut)",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "warmup_steps": "train.warmup",
    "warmup_ratio": "train.warmup",
    "max_grad_norm": "train.max_norm",
    "optim": "train.optimizer",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "lora_target": "adapter.targets",
    "use_rslora": "adapter.rslora",
    "loraplus_lr_ratio": "train.lora_plus",
    "max_seq_length": "data.length",
    "max_length": "data.length",
    "sequence_len": "data.length",
    "cutoff_len": "data.length",
    "output_dir": "run.dir",
    "base_model": "model.base",
    "model_name_or_path": "model.base",
    "report_to": "run.track",
    "gradient_checkpointing": "run.recompute",
}

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class FourBit(Section):
    """Weights in 4 bits, blocks of 64 with one scale each (Dettmers et al. 2023, QLoRA, section 3)."""

    kind: Literal["nf4", "fp4"]
    """`nf4`: levels at the quantiles of a normal distribution; `fp4`: a 4-bit floating-point number."""
    double: bool = True
    """Quantise the scales too: 0.37 bits a weight less."""


class EightBit(Section):
    """LLM.int8(): rows of weights and of inputs scaled by their largest value (Dettmers et al. 2022)."""

    kind: Literal["int8"]
    threshold: float = Field(6.0, ge=0)
    """Input columns that hold a value this large are multiplied in the compute dtype; 0: none."""


class Float8(Section):
    """Weights as 8-bit floating-point numbers (e4m3) with one scale a row."""

    kind: Literal["fp8"]


def _kind(value: Any) -> str:
    """The tag of the branch that a mapping means. It holds a colon, so that no message takes it for a key."""
    kind = value.get("kind", "lora") if isinstance(value, dict) else getattr(value, "kind", value)
    return f"kind: {kind}"


Quantize = Annotated[
    Annotated[FourBit, Tag("kind: nf4")]
    | Annotated[FourBit, Tag("kind: fp4")]
    | Annotated[EightBit, Tag("kind: int8")]
    | Annotated[Float8, Tag("kind: fp8")],
    Discriminator(_kind),
]


class Model(Section):
    base: str
    """A hub id, a local folder, a .gguf file, or `smollm2-135m`, the embedded default."""
    revision: str | None = None
    """The hub revision (branch, tag or commit). The commit that was loaded is recorded in the run."""
    quantize: Quantize | None = None
    """How the frozen linear layers are kept: `{kind: nf4}`, `fp4`, `int8` or `fp8`; null: in the compute dtype. The
    output head never is. Adapters, and what is trained besides them, stay in float32."""
    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of weights and matrix products. `auto`: bfloat16 where the processor multiplies it in hardware
    (AMX, AVX512-BF16, a GPU since Ampere), float16 on GPUs of the two generations before (V100, T4), else float32. A
    CPU that does not multiply what is asked for in hardware takes float32, and says so. Adapters and the optimizer are
    always float32."""
    norms: Literal["compute", "float32"] = "compute"
    """The dtype of normalisation layers and of the output head; `float32` is PEFT's k-bit preparation."""
    trust_remote_code: bool = False
    """Run Python that comes with the model. Off unless written here, and recorded."""


class Lora(Section):
    """Low-rank updates beside frozen linear layers (Hu et al. 2021), and the methods that refine them."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1)
    """Inner dimension r of the update B·A."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / √rank instead (rsLoRA, arXiv:2312.03732), so that larger ranks keep learning."""
    dora: bool = False
    """Train the length of each weight row apart from its direction (DoRA, arXiv:2402.09353)."""
    init: Literal["default", "gaussian", "pissa", "olora", "loftq"] = "default"
    """Start values. `default`: A uniform, B zero. `pissa` (arXiv:2404.02948) and `olora` (arXiv:2406.01775) move the
    main part of each weight into the adapter; `loftq` (arXiv:2310.08659) what quantisation lost of it."""
    dropout: Fraction = 0.0
    """Share of the adapter's inputs set to zero in training; masks do not depend on how a step is cut."""
    targets: str | list[str] = "all-linear"
    """`all-linear` (all linear layers but the head), names of linear layers such as `[q_proj, v_proj]`, or one regular
    expression that matches whole dotted names."""
    ranks: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Other ranks for some layers, as {name or regular expression: rank}."""
    alphas: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Other alphas for some layers, in the same way."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which biases of the model are trained too: none, those of adapted layers, all."""
    modules_to_save: list[str] = []
    """Modules that are trained whole and saved with the adapter, such as `[lm_head]`."""
    new_tokens: list[str] = []
    """Tokens added to the vocabulary; their rows of the embedding are trained and saved with the adapter."""

    @field_validator("new_tokens")
    @classmethod
    def _tokens_can_be_seen(cls, tokens: list[str]) -> list[str]:
        if blank := [token for token in tokens if not token.strip()]:
            raise ValueError(
                f"{blank[0]!r} is blank: a token needs a letter or a sign, to be told from its surroundings"
            )
        return tokens

    @property
    def title(self) -> str:
        """What a report calls it."""
        return f"{'DoRA' if self.dora else 'LoRA'} of rank {self.rank}"


class Bottleneck(Section):
    """Small two-layer networks after attention and MLP of each block (Houlsby et al. 2019)."""

    kind: Literal["bottleneck"]
    size: int = Field(64, ge=1)
    """Width of the middle."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    dropout: Fraction = 0.0

    @property
    def title(self) -> str:
        """What a report calls it."""
        return f"bottlenecks of width {self.size}"


class Full(Section):
    """No adapter: the model's own weights are trained."""

    kind: Literal["none"]
    blocks: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    """`all` weights, or those of the last n blocks, the final norm and an untied head."""

    @property
    def title(self) -> str:
        """What a report calls it."""
        return "all weights" if self.blocks == "all" else f"the last {self.blocks} blocks"


class Bridge(Section):
    """A method of PEFT, by its name."""

    kind: Literal["peft"]
    method: str
    """PEFT's name of it: `PROMPT_TUNING`, `P_TUNING`, `PREFIX_TUNING`, `IA3`, `OFT`, `VERA` …"""
    options: dict[str, Any] = {}
    """Its options, spelled as in PEFT's configuration class."""

    @property
    def title(self) -> str:
        """What a report calls it."""
        return f"{self.method} of PEFT"


Adapter = Annotated[
    Annotated[Lora, Tag("kind: lora")]
    | Annotated[Bottleneck, Tag("kind: bottleneck")]
    | Annotated[Full, Tag("kind: none")]
    | Annotated[Bridge, Tag("kind: peft")],
    Discriminator(_kind),
]


class Source(Section):
    path: str
    """A file (.jsonl .json .csv .tsv .parquet .txt .md, also .gz or .zst), `-` for standard input, or `hub:NAME`."""
    weight: float = Field(1.0, gt=0)
    """How often its rows are seen an epoch; 0.5 takes half of them, 2 takes each twice."""
    split: str | None = None
    """The split of a hub data set."""


class Heldout(Section):
    fraction: Fraction = 0.0
    """Share of the training rows set aside for the evaluation loss; the split depends on the rows and the seed only."""
    rows: int = Field(0, ge=0)
    """The same as a number of rows; the larger of the two wins."""
    seed: int | None = Field(None, ge=0)
    """The seed of the split; null: `train.seed`. A study keeps it where other seeds vary, so that all are held against
    the same rows."""


class Clean(Section):
    unicode: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normalisation form."""
    control: bool = True
    """Remove control characters other than tab and newline."""
    mojibake: bool = False
    """Repair text that was decoded with the wrong encoding."""
    personal: list[Literal["email", "phone", "url", "ip", "card", "id"]] = []
    """Kinds of personal data replaced by typed placeholders such as [EMAIL], and counted."""
    names: str | None = None
    """A recogniser of names as `module:attribute`: a function text -> list of (start, end), each then [NAME]."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What to do with a row whose text was seen before."""
    near_duplicates: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Drop a row whose estimated Jaccard similarity of word 3-shingles with an earlier row reaches this."""


class Data(Section):
    train: list[Source] = Field(min_length=1)
    test: list[Source] = []
    """Rows for `compare`. Never trained on; training rows found in here are handled by `leaks`."""
    heldout: Heldout = Heldout()
    rows: int | None = Field(None, ge=1)
    """Learn from so many of the training rows only: the first ones of an order that depends on `train.seed`, so that
    the rows of a smaller number are among those of a larger one. Held-out and test rows stay what they are."""
    format: str = "auto"
    """The shape of the rows; `auto` detects it. Names: see `luthier data --help`."""
    columns: Literal["auto"] | dict[str, str | list[str]] = "auto"
    """Which column plays which part, as {part: column or list of columns}."""
    instruction: str | None = None
    """Put before each document in formats that have none of their own (document and summary, multiple choice)."""
    system: str | None = None
    """A system message for rows that have none."""
    labels: Literal["letter", "option_n", "text", "cloze"] = "letter"
    """How a multiple-choice answer is written: `B`, `option_2`, or the text of the choice; `cloze`: its text, and the
    question does not list the choices, which is what small models can do."""
    template: str = "auto"
    """How a conversation becomes text: `tokenizer`, `chatml`, `alpaca`, `human-assistant`, `instruct-output`, `plain`;
    `auto`: the tokenizer's own chat template, else `plain`."""
    supervise: Literal["answers", "last", "all"] = "answers"
    """Which tokens carry loss: all assistant turns, the last one, or every token."""
    length: int = Field(1024, ge=8)
    """The most tokens a row may have; also the window of long documents."""
    too_long: Literal["refuse", "drop", "cut"] = "drop"
    """What happens to longer rows. `cut` shortens the prompt's end first and never the end of turn. All are counted."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What happens to rows that cannot be read. Dropped rows are counted and named in the data report."""
    leaks: Literal["drop", "refuse", "keep"] = "drop"
    """What happens to training rows whose text is also in the test rows."""
    clean: Clean = Clean()


class Train(Section):
    samples_per_step: int = Field(8, ge=1)
    """Rows per optimizer step, over all processes. The loss is divided by the step's supervised tokens."""
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps, whatever `epochs` says."""
    lr: float = Field(2e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    warmup: Annotated[int, Field(ge=0)] | Fraction = 0.03
    """Steps of linear warm-up (an integer), or their share of all steps (a fraction)."""
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of the steps over which `wsd` falls to zero."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps its moments in 8 bits; paged ones leave the GPU's memory when it runs short. Both come from
    bitsandbytes; where it cannot run, `adamw` takes their place, and the run says so."""
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    lora_plus: float = Field(1.0, gt=0)
    """The learning rate of the adapters' B as a multiple of A's (LoRA+, arXiv:2402.12354, which advises 16)."""
    max_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this Euclidean norm; null leaves them."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the adapter: those of the last step, or of the lowest evaluation loss."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a lower loss."""
    seed: int = Field(17, ge=0)


class Generate(Section):
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    repetition_penalty: float = Field(1.0, gt=0)


class JsonFields(Section):
    """The share of a JSON reference's fields that a generated JSON answer has with the same value."""

    kind: Literal["json"]
    name: str | None = None
    """What tables call it; null: `json`."""
    fields: list[str] = []
    """Only fields at or below these paths, such as `customer.name` or `items.0.price`; none named: all."""


class Pattern(Section):
    """Whether a regular expression is found in the generated answer."""

    kind: Literal["regex"]
    name: str | None = None
    """What tables call it; null: `regex`."""
    pattern: str
    """As Python's `re.search` reads it: `^\\d{4}$` must be the whole answer, `(?i)sorry` ignores case."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return pattern


class Check(Section):
    """What a Python function of yours says of the generated answer."""

    kind: Literal["python"]
    name: str | None = None
    """What tables call it; null: the function's name."""
    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """`package.module:function`. It is called with the answer's text and the question (a Conversation) and returns
    True, False, a share from 0 to 1, or None where it cannot tell."""


class Judge(Section):
    """Another model says whose answer is better, the base's or the tuned one's, asked in both orders. Nothing is sent
    unless this is written."""

    kind: Literal["judge"]
    name: str | None = None
    """What tables call it; null: `judge`."""
    url: str
    """An OpenAI-compatible endpoint without `/chat/completions`, such as `http://127.0.0.1:8000/v1`."""
    model: str
    """The judge, as the endpoint calls it."""
    criterion: str
    """What makes an answer better, in a sentence: `It names every fault that the customer reports, and no other.`"""
    key_env: str | None = None
    """The environment variable that holds the endpoint's key. The key itself is never written anywhere."""
    share: bool = False
    """Allow an endpoint on another machine, which then reads the questions, the references and both answers."""
    timeout: float = Field(60.0, gt=0)
    """Seconds until a request is given up and tried again, at most five times."""

    @model_validator(mode="after")
    def _stays_here(self) -> Self:
        address = urlsplit(self.url)
        if not _has_port(address) or address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(
                f"judge.url is no address of an endpoint: write http://127.0.0.1:8000/v1 (found {self.url!r})"
            )
        if address.username or address.password:
            raise ValueError("judge.url holds a name or password: put the key into a variable, named by key_env")
        if not (self.share or is_loopback(address.hostname)):
            raise ValueError(
                f"{address.hostname} is another machine: the test questions, their references and both sides' answers "
                "would be sent there; write `share: true` beside the url if they may be"
            )
        return self


def _has_port(address: SplitResult) -> bool:
    """Whether its port is a number, or left out."""
    try:
        return address.port != 0
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _entry(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "a name" if isinstance(value, str) else f"kind: {kind}"


MetricEntry = Annotated[
    Annotated[str, Tag("a name")]
    | Annotated[JsonFields, Tag("kind: json")]
    | Annotated[Pattern, Tag("kind: regex")]
    | Annotated[Check, Tag("kind: python")]
    | Annotated[Judge, Tag("kind: judge")],
    Discriminator(_entry),
]


class Evaluate(Section):
    every: int | None = Field(None, ge=1)
    """Steps between evaluations on the held-out rows; null: five times a run."""
    samples: int = Field(2, ge=0)
    """How many held-out prompts are answered at each evaluation, for the eye."""
    metrics: list[MetricEntry] = Field(
        ["rougeL", "rouge1", "rouge2", "rougeLsum", "exact_match", "perplexity"], min_length=1
    )
    """Names, or mappings for metrics with options (below). The first decides the verdict."""
    harness: list[str] = []
    """Tasks of lm-evaluation-harness that `compare` runs too, on both sides: names, or paths of task files (.yaml)."""
    generate: Generate = Generate()
    rows: int | None = Field(None, ge=1)
    """Compare on this many test rows (the first ones); null: all."""
    forgetting: bool = True
    """Whether `compare` also asks general text and easy general questions, which ship with luthier, to see what was
    forgotten; on a CPU a few of them."""
    slices: list[str] = []
    """Columns of the data by whose values the comparison is broken down too, such as `[topic]`."""


class Save(Section):
    every: int = Field(50, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(2, ge=1)
    """How many of the newest stay; the best one always does."""


class Run(Section):
    dir: str | None = None
    """The run folder; null: runs/<recipe name>."""
    place: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs. `auto`: a CUDA GPU where torch sees one, else the CPU."""
    engine: Literal["auto", "local", "ddp"] = "auto"
    """`ddp`: one process per core (or GPU) with the adapter's gradients summed."""
    processes: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Threads per process."""
    memory: str = "auto"
    """Memory the run may use, such as `6GiB`, or a number of bytes: on a GPU it trains in no more. `auto`: what the
    machine has free."""
    micro_tokens: Literal["auto"] | Annotated[int, Field(ge=8)] = "auto"
    """Tokens of one forward and backward pass; `auto`: as planned from `memory`."""
    recompute: Literal["auto"] | bool | Annotated[int, Field(ge=0)] = "auto"
    """Recompute a block's activations in the backward pass instead of keeping them: true, all blocks; a number, so many
    of them; `auto`: of as few as the memory allows."""
    recompute_gate_up: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Of how many more blocks the product gate|up alone is recomputed, where our own block runs; `auto`: as planned
    where `recompute` is auto too, else none."""
    offload: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """How many of the model's blocks stay in host memory and stream to the GPU as they are needed."""
    offload_embedding: Literal["auto"] | bool = "auto"
    """Leave the input embedding in host memory, where our own block runs and the output head has a weight of its own:
    a step reads a few of its rows. Not Gemma's, which scales them. `auto`: where the memory makes a step faster."""
    offload_activations: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Of how many blocks what is kept for the backward pass waits in host memory, where our own block runs on a GPU;
    `auto`: where that makes a step faster, and of so many that copying takes no longer than computing."""
    unpacked: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Of how many of the model's 4-bit blocks the values are kept beside, not unpacked each time, where our own block
    runs; `auto`: as many as half of the room that is left holds on a GPU, none on a CPU."""
    graphs: Literal["auto"] | bool = "auto"
    """Record a micro-batch's launches on a GPU and replay them, where our own block runs: true, always, in
    micro-batches that leave memory for it; `auto`: where the run takes less time so, and the memory is there."""
    kernels: Literal["auto", "reference", "eager", "compiled"] = "auto"
    """`reference`: the transformers module; `eager`: our block; `compiled`: our block with a C++ compiler's help."""
    log_every: int = Field(1, ge=1)
    save: Save = Save()
    track: list[str] = []
    """Trackers beside metrics.jsonl: tensorboard, wandb, trackio, mlflow, or `module:attribute`."""

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, memory: Any) -> Any:
        return str(memory) if isinstance(memory, int | float) and not isinstance(memory, bool) else memory


class Recipe(Section):
    """A whole recipe. `Recipe.load("my.yaml", "train.lr=1e-4")` reads a file and applies overrides."""

    model: Model
    adapter: Adapter = Lora()
    data: Data
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    run: Run = Run()

    @model_validator(mode="after")
    def _best_needs_rows_to_judge_by(self) -> Self:
        if (self.train.keep == "best" or self.train.patience) and not (
            self.data.heldout.fraction or self.data.heldout.rows
        ):
            raise ValueError(
                "train.keep=best and train.patience need held-out rows: set data.heldout.fraction, e.g. 0.1"
            )
        return self

    @model_validator(mode="after")
    def _loftq_needs_quantised_weights(self) -> Self:
        if isinstance(self.adapter, Lora) and self.adapter.init == "loftq" and self.model.quantize is None:
            raise ValueError(
                "adapter.init=loftq starts from what quantisation takes from the weights: set model.quantize, "
                "e.g. model.quantize={kind: nf4}, or take another init"
            )
        return self

    @model_validator(mode="after")
    def _lora_plus_needs_a_lora(self) -> Self:
        if self.train.lora_plus != 1 and not isinstance(self.adapter, Lora):
            raise ValueError(
                f"train.lora_plus={self.train.lora_plus:g} is the rate of a LoRA's B, which adapter.kind="
                f"{self.adapter.kind} does not have: leave it out"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> Recipe:
        """Reads YAML and applies `section.key=value` overrides (values are YAML too).

        Raises RecipeError naming file, line, column and field; UsageError for a malformed override.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            shipped = [each.stem for each in _SHIPPED.glob("*.yaml")]
            fix = nearest_path(path, *shipped) or "check the path, or write one with `luthier init`"
            raise RecipeError(f"cannot be read ({error.strerror})", where=str(path), fix=fix) from error
        except UnicodeDecodeError as error:
            raise RecipeError("is not UTF-8 text", where=str(path), fix="give a YAML recipe") from error
        return cls.parse(text, *overrides, name=str(path))

    @classmethod
    def parse(cls, text: str, *overrides: str, name: str = "recipe") -> Recipe:
        tree = _read_yaml(text, name)
        given: dict[tuple[str, ...], str] = {}
        for override in overrides:
            key = _apply(tree, override)
            given.pop(key, None)  # so that the last one stands last
            given[key] = override
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(_explain(error, tree, name, given)) from error

    def dump(self) -> str:
        """The full recipe as YAML, defaults included; `parse(dump())` gives it back."""
        from ruamel.yaml import YAML

        yaml, out = YAML(typ="safe"), io.StringIO()
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump(self.model_dump(mode="json"), out)
        return out.getvalue()

    def diff(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Dotted keys whose values differ, as {key: (mine, theirs)}."""
        mine, theirs = flatten(self.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
        return {k: (mine.get(k), theirs.get(k)) for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)}

    @property
    def split_seed(self) -> int:
        """The seed that decides which rows are held out."""
        return self.train.seed if self.data.heldout.seed is None else self.data.heldout.seed

    def learned(self) -> dict[str, Any]:
        """The half that says what is learned, as plain values: two runs with equal `learned()` have one loss curve."""
        return self.model_dump(mode="json", exclude={"run"})


def packaged(name: str) -> Path | None:
    """The recipe that ships with luthier under this name, unless a file or folder of that name is at hand."""
    path = _SHIPPED / f"{name}.yaml"
    return path if path.is_file() and not Path(name).exists() else None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _read_yaml(text: str, name: str) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        tree = YAML(typ="rt").load(text)
    except (YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        what = f"is not valid YAML ({getattr(error, 'problem', None) or error})"
        raise RecipeError(what, where=where, fix=_for_data(name)) from error
    if not isinstance(tree, dict):
        what = "is not a recipe: it should be a mapping with `model`, `data` …"
        raise RecipeError(what, where=name, fix=_for_data(name))
    return tree


def _for_data(name: str) -> str:
    """What to do where a file of data is given in place of a recipe; empty for other names."""
    is_data = Path(name).suffix in (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt")
    return f"it looks like data: luthier init BASE {shlex.quote(name)} writes a recipe for it" if is_data else ""


def _apply(tree: dict[str, Any], override: str) -> tuple[str, ...]:
    """Sets what `section.key=value` says, and returns the parts of its key."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UsageError(f"'{override}' is not an override", fix="write section.key=value, e.g. train.lr=1e-4")
    try:
        parsed = YAML(typ="safe").load(value) if value.strip() else None
    except YAMLError as error:
        raise UsageError(f"the value in '{override}' is not valid YAML", fix="quote it") from error
    node: Any = tree
    for part in parts[:-1]:
        step = node[int(part)] if isinstance(node, list) and part.isdigit() and int(part) < len(node) else None
        node = step if step is not None else node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict | list):
            raise UsageError(f"'{override}': '{part}' is not a section that holds keys", fix="write section.key=value")
    if isinstance(node, list):
        raise UsageError(f"'{override}' names a list", fix="give the whole list, e.g. evaluate.metrics=[rougeL]")
    node[parts[-1]] = parsed
    return tuple(parts)


def _explain(error: ValidationError, tree: dict[str, Any], name: str, given: dict[tuple[str, ...], str]) -> str:
    """All problems at once, a line each: file:line:column (or the override): field: what is wrong; what to do."""
    problems: dict[tuple[tuple[Any, ...], str], list[dict[str, Any]]] = {}
    for problem in error.errors(include_url=False):
        problems.setdefault(_subject(dict(problem)), []).append(dict(problem))
    lines = []
    for (path, kind), about in problems.items():
        field = ".".join(map(str, path)) or "recipe"
        message = _of_another_kind(field, kind, about) if kind else _message(path, field, about)
        lines.append(f"{_overridden(path, given) or _place(tree, path, name)}: {field}: {message}")
    return "\n".join(lines)


def _subject(problem: dict[str, Any]) -> tuple[tuple[Any, ...], str]:
    """The path that a problem is about; for a key that only other kinds of its section have, that of the section, and
    the kind that it has."""
    path = tuple(part for part in problem["loc"] if _is_key(part))
    kind = str(problem["loc"][-2]) if len(problem["loc"]) > 1 else ""
    is_another_s = kind.startswith("kind: ") and any(path[-1] in other.model_fields for other in _sections(path[:-1]))
    return (path[:-1], kind) if problem["type"] == "extra_forbidden" and is_another_s else (path, "")


def _of_another_kind(field: str, kind: str, about: list[dict[str, Any]]) -> str:
    keys = ", ".join(str(problem["loc"][-1]) for problem in about)
    what, them = ("is a key", "it") if len(about) == 1 else ("are keys", "them")
    return f"{keys} {what} of another kind; take {them} out, or replace the section as a whole: {field}={{{kind}}}"


def _message(path: tuple[Any, ...], field: str, about: list[dict[str, Any]]) -> str:
    problem = about[0]
    if problem["type"] == "extra_forbidden":
        other = _ELSEWHERE.get(str(path[-1])) or (_home(str(path[0])) if len(path) == 1 else None)
        hint = f"here it is `{other}`" if other else nearest(str(path[-1]), _siblings(problem["loc"]))
        return f"unknown key; {hint}"
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"] in ("union_tag_invalid", "model_type") and (kinds := _kinds(path)):
        return _kind_wanted(field, kinds, problem["input"])
    if problem["type"] in ("model_type", "model_attributes_type") and not isinstance(problem["input"], dict):
        return f"is a section that holds keys: {', '.join(_siblings([*path, '']))} (found {problem['input']!r})"
    return _said(about)


def _home(key: str) -> str | None:
    """The whole name of a key that is written without its section, where one section has it."""
    homes = [name for name in Recipe.model_fields for section in _sections([name]) if key in section.model_fields]
    return f"{homes[0]}.{key}" if len(set(homes)) == 1 else None


def _kind_wanted(field: str, kinds: list[str], given: Any) -> str:
    kind = given.get("kind") if isinstance(given, dict) else given
    if not isinstance(kind, str):
        return f"write a mapping whose kind is one of {', '.join(kinds)}"
    if kind in kinds:
        return f"write a mapping: {field}={{kind: {kind}}}"
    return f"there is no kind '{kind}'; {nearest(kind, kinds)}"


def _said(about: list[dict[str, Any]]) -> str:
    """pydantic's words on one value, which may have failed at several types."""
    first, *others = dict.fromkeys(problem["msg"].removeprefix("Value error, ") for problem in about)
    text = " or ".join([first, *(text.removeprefix("Input should be ") for text in others)])
    given = about[0].get("input")
    return text if isinstance(given, dict | list | BaseModel) else f"{text} (found {given!r})"


def _is_key(part: Any) -> bool:
    # Unions put the branch's name ("list[str]", "literal['auto']", "constrained-int") into the location; it is no key.
    return isinstance(part, int) or (
        part.replace("_", "").isalnum() and part not in ("int", "float", "bool", "str", "constrained")
    )


def _siblings(path: Sequence[Any]) -> list[str]:
    return sorted({name for section in _sections(path[:-1]) for name in section.model_fields})


def _kinds(path: Sequence[Any]) -> list[str]:
    """The kinds of section that may lie at `path`, if it says of which kind it is."""
    sections = [section for section in _sections(path) if "kind" in section.model_fields]
    return [kind for section in sections for kind in _kinds_of(section)]


def _kinds_of(section: type[Section]) -> tuple[str, ...]:
    return get_args(section.model_fields["kind"].annotation)


def _sections(path: Sequence[Any]) -> list[type[Section]]:
    """The sections that may lie at `path`, of the kinds that it names on the way."""
    sections: list[type[Section]] = [Recipe]
    for part in path:
        if isinstance(part, str) and part.startswith("kind: "):
            sections = [section for section in sections if part.removeprefix("kind: ") in _kinds_of(section)]
        elif isinstance(part, str):
            fields = [section.model_fields[part] for section in sections if part in section.model_fields]
            sections = [inner for field in fields for inner in sections_in(field.annotation)]
    return sections


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a field's type can be."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return list(dict.fromkeys(inner for part in get_args(annotation) for inner in sections_in(part)))


def _overridden(path: Sequence[Any], given: dict[tuple[str, ...], str]) -> str | None:
    """The last override that says anything of the value at `path`: of it, of a part of it, or of what holds it."""
    parts = tuple(map(str, path))
    about = [text for key, text in given.items() if key[: len(parts)] == parts[: len(key)]]
    return about[-1] if about and parts else None


def _place(tree: Any, path: Sequence[Any], name: str) -> str:
    """`file:line:column` of the deepest part of `path` that the file has."""
    place, node = name, tree
    for part in path:
        try:
            line, column = node.lc.item(part) if isinstance(part, int) else node.lc.key(part)
            node = node[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
        place = f"{name}:{line + 1}:{column + 1}"
    return place
