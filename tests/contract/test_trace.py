"""What the plan traces without data against the same step with data: the bytes of tensors that are live at the peak."""

from __future__ import annotations

import weakref
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from luthier import recipe
from luthier.adapters.lora import attach
from luthier.data.stream import Micro
from luthier.kernels import drop, fused, native, pointwise
from luthier.kernels.place import noticing, planned_for
from luthier.model import attention
from luthier.model.causal import CausalModel, Kernels
from luthier.model.quantize import quantize_module
from luthier.model.segments import reserved
from luthier.model.trace import Meter, _fixed, _micro, outline, trace
from luthier.train.optim import flat_gradient

Sizes = dict[str, Any]
SMALL: Sizes = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WIDE = SMALL | {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_key_value_heads": 4}
QWEN = SMALL | {"model_type": "qwen2", "vocab_size": 2000, "tie_word_embeddings": True}
PHI = SMALL | {"model_type": "phi", "hidden_act": "gelu_new", "num_key_value_heads": 4}
GLM = SMALL | {"model_type": "glm4", "head_dim": 32, "pad_token_id": 0}
NF4 = recipe.FourBit(kind="nf4")


class Live(TorchDispatchMode):
    """The bytes of the storages that were made inside, and the most of them that were there at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        result = op(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key not in self.known and key not in before:
                self.known[key] = weakref.ref(storage, lambda _, key=key, size=size: self.gone(key, size))
                self.now += size
                self.most = max(self.most, self.now)
        return result

    def gone(self, key: int, size: int) -> None:
        del self.known[key]
        self.now -= size


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def micro(lengths: list[int], vocabulary: int) -> Micro:
    """Rows of which every token is learned, and no two begin alike."""
    tokens = sum(lengths)
    ids = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(n) for n in lengths])
    bounds = (0, *accumulate(lengths))
    return Micro(ids, positions, bounds, torch.arange(tokens), ids, torch.arange(len(lengths)), step=0)


def lived(
    sizes: Sizes, adapter: recipe.Lora, packed: bool, kernels: Kernels, lengths: list[int], recompute: bool
) -> int:
    """Bytes at the peak of a real step, besides what lies there throughout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**sizes)
    module = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).eval()
    if packed:
        quantize_module(module, NF4, torch.float32)
    model = CausalModel(module, attach(module, adapter, seed=0), kernels=kernels, recompute=recompute)
    assert model.adapter is not None
    if model.decoder is not None:
        _ = model.decoder.updates.gradients  # it stays from one step to the next
    flat_gradient(model.adapter.named_parameters())
    batch = micro(lengths, sizes["vocab_size"])
    with Live() as live:
        model.loss(batch).backward()  # type: ignore[no-untyped-call]
    return live.most


def traced(
    sizes: Sizes, adapter: recipe.Lora, packed: bool, kernels: Kernels, lengths: list[int], recompute: bool
) -> int:
    settings = recipe.Model(base="b", quantize=NF4 if packed else None)
    model = outline(sizes, settings, adapter, dtype=torch.float32, recompute=recompute, kernels=kernels)
    found = trace(model, lengths)
    return sum(found.peak.values()) - sum(found.fixed.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    ("sizes", "kernels", "lengths"),
    [
        (SMALL, "eager", [150, 150, 40]),
        (WIDE, "eager", [600]),
        (WIDE, "compiled", [600]),
        (WIDE, "reference", [600]),
        (QWEN, "compiled", [90] * 5),
        (PHI, "compiled", [150, 150, 40]),
        (GLM, "eager", [150, 150, 40]),
    ],
)
def test_a_step_takes_what_is_traced_without_data(
    sizes: Sizes, kernels: Kernels, lengths: list[int], packed: bool, recompute: bool
) -> None:
    if kernels == "compiled" and native.compiler() is None:
        pytest.skip("no C++ compiler")
    arguments = (sizes, recipe.Lora(rank=4), packed, kernels, lengths, recompute)
    assert traced(*arguments) == pytest.approx(lived(*arguments), rel=0.01)


@pytest.mark.parametrize("kernels", ["eager", "reference"])
def test_the_arithmetic_of_a_step_is_traced(kernels: Kernels) -> None:
    """2 FLOPs a weight and token forward and 2 backward, where weights are frozen, and 6 for an adapter's."""
    model = outline(WIDE, recipe.Model(base="b"), recipe.Lora(rank=4), dtype=torch.float32, recompute=False,
                    kernels=kernels)  # fmt: skip
    work = trace(model, [150, 150]).work
    flops = sum(work[phase, "products"].flops for phase in ("activations", "backward"))
    width, wide, layers = 256, 704, 3
    weights, ranks = 4 * width * width + 3 * width * wide, 4 * (8 * width + 3 * (width + wide))
    expected = 300 * layers * (4 * weights + 6 * ranks)
    assert expected <= flops < 1.25 * expected  # attention, and nothing for what is left of the first block


@pytest.mark.parametrize("kernels", ["eager", "reference"])
def test_dropout_is_traced_too(kernels: Kernels) -> None:
    arguments = (SMALL, recipe.Lora(rank=4, dropout=0.1), False, kernels, [150, 150, 40], False)
    assert traced(*arguments) == pytest.approx(lived(*arguments), rel=0.01)


def on_a_gpu() -> CausalModel:
    """Without data; wide enough that its tensors are no small ones to the allocator."""
    sizes, settings = SMALL | {"hidden_size": 512, "intermediate_size": 2048}, recipe.Model(base="b", quantize=NF4)
    options: Any = {"dtype": torch.bfloat16, "recompute": False, "kernels": "compiled", "capability": (9, 0)}
    made = outline(sizes, settings, recipe.Lora(rank=4), **options)
    trace(made, [8], capability=(9, 0))  # what the first pass makes and keeps
    return made


def taken(model: CausalModel, batches: list[list[int]], learned: bool = True) -> int:
    """Bytes of the pool in which passes over these rows run one after the other, as recorded ones do."""
    pool, losses = Meter(), []
    for _, tensor in _fixed(model):
        pool.known.add(id(tensor.untyped_storage()))
    with planned_for((9, 0)), pool, noticing(pool.launched), torch.set_grad_enabled(learned):
        for lengths in batches:
            loss = model.loss(_micro(lengths))
            if learned:
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())  # stays there, as what a graph leaves does
            del loss
    return reserved(pool.segments.tops)


def test_graphs_of_several_shapes_take_what_the_largest_takes_in_whatever_order_they_come() -> None:
    model, sizes = on_a_gpu(), [[400] * count for count in (20, 7, 13, 16, 9)]
    alone = taken(model, [max(sizes)])
    assert alone > 1.9 * taken(model, [[400] * 10])
    for order in (sizes, sorted(sizes), sorted(sizes, reverse=True)):
        assert alone <= taken(model, order) <= alone + 2**21  # a page for the losses


def test_a_pass_without_gradient_takes_what_one_block_of_it_takes() -> None:
    model, lengths = on_a_gpu(), [400] * 20
    found = trace(model, lengths, capability=(9, 0)).evaluation
    assert found == taken(model, [lengths], learned=False) > 0
    assert found < taken(model, [lengths]) / 3


def test_parts_for_a_gpu_make_what_their_twins_make() -> None:
    """Shapes and dtypes on tensors without data, where they stand for themselves in a trace."""
    x, dy, gate_up = (torch.empty(7, n, dtype=torch.bfloat16, device="meta") for n in (12, 12, 24))
    weight, scale, moments = x[0], torch.empty(7, 1, device="meta"), torch.empty(7, 2, device="meta")
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("rms_norm", (x, weight, 1e-5)),
        ("add_rms_norm", (x, dy, weight, 1e-5)),
        ("rms_norm_backward", (dy, x, scale, weight, dy)),
        ("layer_norm", (x, weight, weight, 1e-5)),
        ("layer_norm_backward", (dy, x, moments, weight, weight, dy)),
        ("activate", (gate_up, "silu", True)),
        ("activate", (gate_up, "gelu", False)),
        ("activate_backward", (dy, gate_up, "gelu_tanh", True)),
        ("activate_backward", (dy, x, "gelu", False)),
    ]
    for name, arguments in calls:
        made, twins = (getattr(parts, name)(*arguments) for parts in (fused.parts(), pointwise.EAGER))
        for one, twin in zip(tree_leaves(made), tree_leaves(twins), strict=True):
            assert (one.shape, one.dtype) == (twin.shape, twin.dtype), name
    x.requires_grad_()
    key, samples, positions = (torch.empty(n, dtype=torch.int64) for n in (1, 7, 7))
    dropped = drop.drop(x, key, samples, positions, 3, 0.1)
    dropped.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert dropped.shape == x.grad.shape == x.shape
