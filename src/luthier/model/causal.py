"""A causal language model as training, evaluation and chat hold it: the hidden states that matter, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import fields, replace
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from luthier import recipe
from luthier.adapters.method import Adapter, Noise, attach
from luthier.allocator import keep_freed_memory, return_freed_memory
from luthier.errors import ModelError
from luthier.kernels import fused, native, pointwise
from luthier.kernels.dropout import mask_key
from luthier.kernels.loss import Head, linear_cross_entropy
from luthier.kernels.place import on_gpu
from luthier.model import attention, families, head, layout
from luthier.model.decoder import SETTINGS, Decoder
from luthier.model.finite import blaming_weights
from luthier.model.graphs import CudaRecorder, Graphs, backward
from luthier.model.offload import Streamed, device_of, embedding_to_host, stream
from luthier.model.original import original
from luthier.model.pack import Coming, Placed, numbers, placed, share_prefix, trim
from luthier.model.recompute import recomputing

if TYPE_CHECKING:
    from luthier.data.stream import Micro

Kernels = Literal["reference", "eager", "compiled"]


class CausalModel:
    """A frozen transformers module, perhaps with an adapter, run on packed rows of tokens.

    `module` is complete in itself: generation calls it directly, adapter included.

    The first `recompute` blocks (True: all) make their activations again in the backward pass; of `recompute_gate_up`
    more, our own decoder makes that product alone again. Of the first `unpacked` ones it keeps the values of packed
    weights. Of the first `away` ones, what it keeps for the backward pass is in host memory meanwhile; the weights of
    `streamed` ones are there until they are needed. Answers take no more of a GPU than `memory` bytes, or what is free.

    Raises ModelError for an adapter or a family that the block of `kernels` does not compute, and for a module that is
    not causal.
    """

    def __init__(
        self,
        module: Any,
        adapter: Adapter | None,
        *,
        kernels: Kernels = "reference",
        recompute: bool | int = False,
        recompute_gate_up: int = 0,
        unpacked: int = 0,
        streamed: Streamed | None = None,
        away: int = 0,
        memory: int | None = None,
    ) -> None:
        self.module, self.adapter, self.recompute, self.kernels = module, adapter, recompute, kernels
        self.streamed, self.memory = streamed, memory
        attention.take_over(module)
        embed = module.get_input_embeddings()
        self.device = device_of(embed)
        ids = torch.arange(3, 11, device=self.device)[None] % len(embed.weight)
        first = embed(ids[:, :1])
        self.dtype: torch.dtype = first.dtype
        self.parts = _parts(kernels, first)
        self.output = head.find(module, ids)
        self.decoder: Decoder | None = None
        self.graphs: Graphs | None = None
        self.layout: layout.Layout = "packed"
        if kernels != "reference":
            options: Any = {"unpacked": unpacked, "streamed": streamed, "away": away}
            self.decoder = _decoder(module, adapter, self.parts, options)
            self.decoder.recompute(recompute, recompute_gate_up)
            return
        self.layout = layout.find(module, self._run, len(embed.weight), self.device)
        if recompute:
            recomputing(module, None if adapter is None else adapter.noise, recompute)

    def keep_less(self, free: Collection[str] = SETTINGS) -> bool:
        """Lets recorded launches go, which come again; where there are none, makes our decoder take less memory, see
        there. False where it cannot."""
        if self.graphs is not None and self.graphs.give_way():
            return True
        less = self.decoder is not None and self.decoder.keep_less(free)
        if less and self.graphs is not None:
            self.graphs.forget()  # they read, and leave, what was there before
        return less

    def forget_recorded(self) -> bool:
        """Lets recorded launches go, which come again, for what needs memory meanwhile; whether there were any."""
        recorded = self.graphs is not None and bool(self.graphs.recorded)
        if self.graphs is not None:
            self.graphs.forget()
        return recorded

    @property
    def head(self) -> Head:
        """From what `hidden` gives to logits."""
        return Head(None) if self.output is None else self.output.head()

    def hidden(self, micro: Micro) -> Tensor:
        """[S, H]: what reaches the head at `micro.rows`, differentiable in the adapter; the logits themselves, [S, V],
        where they are more than our loss computes (see `head.find`)."""
        if not len(micro.rows):
            return self._nothing()
        if self.decoder is not None:
            micro = self.ready(micro)  # before it is moved: a GPU would have to be waited for
            if self.decoder.away is not None:  # before anything is made: what a pass that failed had may be written yet
                self.decoder.away.begin()
            if self.decoder.too_long(micro):
                return self._beyond_the_window(micro)
            if on_gpu(self.decoder.norm.weight):
                told = _moved(numbers(micro, self._key(micro)), self.device)
                return self._placed_hidden(placed(told, micro, max(b - a for a, b in pairwise(micro.bounds))))
            noise = self._set_noise(micro)
            # Dropout tells the rows' prefixes apart: each has masks of its own.
            micro, prefix = (micro, 0) if self._drops else share_prefix(micro)
            return self.decoder.hidden(micro, noise, prefix)
        micro = _all_moved(micro, self.device)
        return self._packed(micro) if self.layout == "packed" else self._padded(trim(micro))

    def ready(self, micro: Micro) -> Micro:
        """`micro` as the other methods need it on the host; they take one that is ready, too."""
        return micro if self.decoder is None or micro.trimmed else replace(trim(micro), trimmed=True)

    def loss(self, micro: Micro) -> Tensor:
        """fp32 scalar: the sum of the losses of `micro.targets`."""
        return linear_cross_entropy(self.hidden(micro), self.head, _moved(micro.targets, self.device), self.parts)

    def accumulate(self, micro: Micro, scale: float = 1.0) -> Tensor:
        """Adds the gradient of the loss times `scale` to the `.grad` of the adapter's parameters; returns the loss,
        without gradient. By a CUDA graph, where `record` was called before."""
        assert self.adapter is not None
        parameter = next(self.adapter.parameters())
        if self.graphs is None or parameter.grad is None or not len(micro.rows):
            return backward(self.loss(micro), scale)
        assert self.decoder is not None
        micro = self.ready(micro)
        if self.decoder.too_long(micro):
            self._beyond_the_window(micro)
        return self.graphs.accumulate(micro, self._key(micro), scale, (parameter, parameter.grad))

    def record(self, price: float = 0.0) -> None:
        """Makes `accumulate` record its launches on a GPU, and replay them. Our decoder must run the model, in 16 bits
        and by flash attention; `plan` knows where. `price`: as of `Graphs`."""
        assert self.decoder is not None
        told: Any = {"reads": self.decoder.updates.launches, "programs": self.decoder.programs}
        self.graphs = Graphs(self._placed_loss, self.device, CudaRecorder(), **told, price=price)

    def expect(self, coming: Callable[[], Coming]) -> None:
        """Tells what micro-batches are to come: recorded ones are padded to the shapes that suit these."""
        if self.graphs is None or not self.graphs.price:
            return
        assert self.decoder is not None
        linears = chain.from_iterable(block.linears for block in self.decoder.blocks)
        weights = sum(linear.columns[-1].stop * linear.features for linear in linears)
        head = 0 if self.head.weight is None else self.head.weight.numel()
        self.graphs.expect(coming(), row=head / weights)

    def _nothing(self) -> Tensor:
        """[0, H]: `hidden` where nothing is supervised. It is a part of a parameter, so that a loss of it can go
        backward, too."""
        embedding = self.module.get_input_embeddings().weight
        whole = embedding if self.adapter is None else next(self.adapter.parameters())
        return whole.flatten()[:0].view(0, embedding.shape[1]).to(self.dtype)

    def _placed_hidden(self, micro: Placed) -> Tensor:
        assert self.decoder is not None
        noise = self._tell_noise(micro.step, micro.owners, micro.positions)
        return self.decoder.hidden(micro, None if noise is None else replace(noise, key=micro.key))

    def _placed_loss(self, micro: Placed) -> Tensor:
        return linear_cross_entropy(self._placed_hidden(micro), self.head, micro.targets, self.parts)

    def _key(self, micro: Micro) -> int:
        return 0 if self.adapter is None else mask_key(self.adapter.noise.seed, micro.step)

    def _packed(self, micro: Micro) -> Tensor:
        self._set_noise(micro)
        with attention.packed(micro.bounds):
            return self._run(layout.packed(self.module, micro.ids, micro.positions))[0, micro.rows]

    def _beyond_the_window(self, micro: Micro) -> Tensor:
        """`hidden` by the module itself, which masks what its window leaves out: rows that are only evaluated may be
        longer than those that are learned, by which our block was chosen. Raises ModelError in training."""
        assert self.decoder is not None
        if torch.is_grad_enabled() and self.adapter is not None:
            fix = f"lower data.length to the model's attention window of {self.decoder.window} tokens"
            raise ModelError("a row is longer than our block sees", fix=f"{fix}, or set run.kernels=reference")
        return self._padded(_all_moved(micro, self.device))

    def _padded(self, micro: Micro) -> Tensor:
        found, rows = [], []
        for part in layout.rectangles(micro):
            self._tell_noise(micro.step, part.samples, part.positions)
            found.append(self._run(layout.padded(self.module, part.ids)).flatten(0, 1)[part.places])
            rows.append(part.rows)
        return torch.cat(found)[torch.cat(rows).argsort()]

    def _run(self, arguments: dict[str, Any]) -> Tensor:
        """What reaches the head, [B, T, H], or the logits [B, T, V]."""
        if self.output is None:
            return self.module(**arguments).logits  # type: ignore[no-any-return]
        with self.output.reading() as seen:
            self.module(**arguments)
        return seen[0]

    @property
    def _drops(self) -> bool:
        return self.adapter is not None and self.adapter.dropout > 0 and torch.is_grad_enabled()

    def _set_noise(self, micro: Micro) -> Noise | None:
        lengths = torch.tensor(micro.bounds).diff().to(micro.samples.device)
        # With the sum told, no GPU has to be waited for.
        samples = micro.samples.repeat_interleave(lengths, output_size=len(micro.ids))
        return self._tell_noise(micro.step, samples, micro.positions)

    def _tell_noise(self, step: int, samples: Tensor, positions: Tensor) -> Noise | None:
        """What dropout depends on, told to the adapter's layers. It is off where no gradient is wanted."""
        if self.adapter is None:
            return None
        noise = self.adapter.noise
        wanted = torch.is_grad_enabled()
        noise.step, noise.samples, noise.positions = (step, samples, positions) if wanted else (step, None, None)
        return replace(noise)


def _parts(kernels: Kernels, like: Tensor) -> pointwise.Pointwise:
    """Those that compute where `like` is."""
    if kernels != "compiled":
        return pointwise.EAGER
    if not on_gpu(like):
        return native.PARTS if like.is_meta else native.parts()
    if not like.is_meta and find_spec("triton") is None:
        fix = "install it, or set run.kernels to eager or reference"
        raise ModelError("our block's parts for a GPU need Triton, which is not installed", fix=fix)
    return fused.parts()


def _moved(x: Tensor, device: torch.device) -> Tensor:
    # Out of pinned memory a copy waits for nothing.
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.is_cpu else x.to(device)


def _all_moved(micro: Micro, device: torch.device) -> Micro:
    values = ((f.name, getattr(micro, f.name)) for f in fields(micro))
    tensors: dict[str, Any] = {name: _moved(x, device) for name, x in values if isinstance(x, Tensor)}
    return replace(micro, **tensors)


def _decoder(module: Any, adapter: Adapter | None, parts: pointwise.Pointwise, options: dict[str, Any]) -> Decoder:
    family, fix = families.find(module.config), "set run.kernels to auto or reference"
    if family is None:
        raise ModelError(f"our decoder block does not run '{module.config.model_type}' models", fix=fix)
    if adapter is not None and not adapter.foldable:
        raise ModelError("our decoder block does not compute this adapter, or these packed weights", fix=fix)
    return Decoder(module, family, parts, **options)


def build(
    model: recipe.Model,
    adapter: recipe.Adapter | None,
    *,
    folder: Path,
    kernels: Kernels,
    recompute: bool | int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    offload: int = 0,
    offload_embedding: bool = False,
    offload_activations: int = 0,
    recompute_gate_up: int = 0,
    unpacked: int = 0,
    graphs: bool = False,
    graph_price: float = 0.0,
    memory: int | None = None,
    loaded: Any = None,
) -> CausalModel:
    """Loads the base model in `folder`, freezes it and attaches a new adapter.

    `kernels`: `reference` runs the transformers module, which every family can; `eager` and `compiled` our own decoder
    block, for the families in `families.py`. `recompute`, `recompute_gate_up`, `unpacked`: as in `CausalModel`. With
    `offload`, the weights of so many of the first decoder blocks stay in host memory and stream to `device`; our block
    streams packed ones. With `offload_embedding` the input embedding stays there, which must be no one else's weight
    and not trained; with `offload_activations` goes there what so many of our blocks keep for the backward pass.
    With `graphs`, launches are recorded on a GPU, each shape for `graph_price` (see `CausalModel.record`). `memory`: as
    in `CausalModel`.
    `loaded`: the base, read before by `load_causal` with the same settings; it stays as it is, and its weights are
    shared (see `shell`).

    Raises ModelError for a folder that cannot be loaded and for blocks that cannot be streamed, AdapterError for
    targets that match nothing.
    """
    from luthier.model.load import load_causal

    _check_offload(model, offload, kernels, recompute)
    return_freed_memory()  # a heap that keeps what it had would keep the weights that loading merges and packs, too
    if loaded is not None:
        module = shell(loaded)
    else:
        options: Any = {"offload": offload, "offload_embedding": offload_embedding}
        module = load_causal(folder, model, device=device, dtype=dtype, attention="packed", **options)
    if offload_embedding:
        embedding_to_host(module, device)
    with blaming_weights(folder, dtype):
        attached = attach(module, adapter, seed, **_facts(adapter, folder)) if adapter is not None else None
        streamed = stream(module, offload, device) if offload else None
        options = {"recompute": recompute, "recompute_gate_up": recompute_gate_up, "unpacked": unpacked}
        options |= {"streamed": streamed, "away": offload_activations, "memory": memory}
        built = CausalModel(module, attached, kernels=kernels, **options)
    if kernels != "reference":
        keep_freed_memory()
    if graphs:
        built.record(graph_price)
    return built


def _check_offload(model: recipe.Model, offload: int, kernels: Kernels, recompute: bool | int) -> None:
    """Raises ModelError for blocks that would not find their weights."""
    if offload and kernels != "reference" and model.quantize is None:
        fix = "set model.quantize, e.g. {kind: nf4}, or run.kernels=reference, or run.offload=0"
        raise ModelError("our decoder block streams packed weights from host memory, and these are not", fix=fix)
    if offload and kernels == "reference" and recompute is not True:
        fix = "set run.recompute to auto or true, or run.offload=0"
        raise ModelError("blocks that stream from host memory have to be recomputed", fix=fix)


def shell(module: nn.Module) -> nn.Module:
    """A module of the same structure with the same tensors, not copies: layers can be put into its places, and what is
    attached to it leaves `module` alone."""
    tensors = chain(module.parameters(), module.buffers())
    return deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _facts(adapter: recipe.Adapter, folder: Path) -> dict[str, Any]:
    """What a LoRA may need of the folder: LoftQ starts from what quantisation took, which the loaded model no longer
    tells, and the tokenizer gives added tokens their ids."""
    from luthier.model.load import load_tokenizer

    facts: dict[str, Any] = {}
    if isinstance(adapter, recipe.Lora) and adapter.init == "loftq":
        facts["original"] = original(folder)
    if isinstance(adapter, recipe.Lora) and adapter.new_tokens:
        tokenizer = load_tokenizer(folder, adapter)
        facts["tokens"] = [tokenizer.id(token) for token in adapter.new_tokens]
    return facts
