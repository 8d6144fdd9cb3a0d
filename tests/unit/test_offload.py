"""Weights in host memory come to the device when a block needs them, and what is computed stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import tiny
from luthier.adapters.method import attach
from luthier.data.stream import Micro
from luthier.model import offload
from luthier.model.away import CHUNK, Away, Parcel, Shelf
from luthier.model.causal import CausalModel
from luthier.model.decode import is_fast
from luthier.model.fast import FastDecoder
from luthier.model.generate import Sampling, generate
from luthier.model.lane import Lane
from luthier.model.quantize import quantize_module
from luthier.model.recompute import recomputing
from luthier.recipe import FourBit
from luthier.train.memory import left_open

IDS = torch.arange(1, 21)[None]
BLOCKS = 4


def model(count: int = 0, *, recompute: bool = False) -> tuple[Any, Any, offload.Streamed | None]:
    """A tiny Llama with an adapter, `count` of its blocks streamed on the CPU: the model, the adapter, the stream."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = tiny.config()
    config.num_hidden_layers = BLOCKS
    module = LlamaForCausalLM(config).requires_grad_(False)
    adapter = attach(module, tiny.recipe("adapter.dropout=0").adapter, 0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    streamed = offload.stream(module, count, torch.device("cpu")) if count else None
    if recompute:
        recomputing(module, None)
        module.train()
    return module, adapter, streamed


def step(module: Any) -> dict[str, torch.Tensor]:
    """The gradients of one step."""
    module.zero_grad()
    module(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("count", [1, 3, BLOCKS])
def test_the_gradients_are_those_of_weights_that_stay(count: int) -> None:
    expected = step(model(recompute=True)[0])
    module, _, streamed = model(count, recompute=True)
    for _ in range(2):
        found = step(module)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert streamed is not None
    assert len(streamed.places) == 2


def test_every_use_of_a_weight_is_of_its_copy_on_the_device() -> None:
    module, _, streamed = model(3, recompute=True)
    assert streamed is not None
    used: list[int] = []

    def look(index: int) -> Any:
        def hook(layer: Any, *_: Any) -> None:
            assert layer.weight.untyped_storage()._cdata == streamed.places[index % 2].untyped_storage()._cdata
            assert streamed.holds[index % 2] == index
            used.append(index)

        return hook

    for index in range(3):
        module.model.layers[index].mlp.down_proj.base.register_forward_hook(look(index))
    step(module)
    assert used == [0, 1, 2, 2, 1, 0]
    # Forward 0, 1, 2; backward 0: the last two blocks are still there.
    assert streamed.fetches == 4
    step(module)
    assert streamed.fetches == 4 + 2  # 0 and 1 are there already


class Recomputed(nn.Module):
    """A block whose hooks run again when it is recomputed, to its end; transformers' versions differ in this."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, **options: Any) -> Any:
        with set_checkpoint_early_stop(False):
            return checkpoint(self.block, x, use_reentrant=False, **options)


def test_a_recomputation_that_runs_the_hooks_leaves_the_weights_for_the_backward_pass() -> None:
    expected = step(model()[0])
    module, _, streamed = model(3)
    assert streamed is not None
    module.model.layers = nn.ModuleList(Recomputed(block) for block in module.model.layers)
    found = step(module)
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))
    assert streamed.fetches == 4


def test_a_forward_pass_without_gradients_begins_anew_each_time() -> None:
    module, _, streamed = model(BLOCKS)
    expected = model()[0](input_ids=IDS, use_cache=False).logits
    for _ in range(2):
        with torch.no_grad():
            found = module(input_ids=IDS, use_cache=False).logits
        assert torch.equal(found, expected)
    assert streamed is not None
    assert streamed.fetches == 2 * BLOCKS


def ours(*, stream: int = 0, embedding: bool = False, **options: Any) -> CausalModel:
    """A tiny Llama of packed weights, run by our blocks on a CPU: `stream` of them as if that were a GPU."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = tiny.config()
    config.update({"num_hidden_layers": BLOCKS, "tie_word_embeddings": False})
    module = LlamaForCausalLM(config).requires_grad_(False).eval()
    quantize_module(module, FourBit(kind="nf4"), torch.float32)
    adapter = attach(module, tiny.recipe("adapter.dropout=0").adapter, 0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    device = torch.device("cpu")
    if embedding:
        offload.embedding_to_host(module, device)
    streamed = offload.stream(module, stream, device) if stream else None
    return CausalModel(module, adapter, kernels="eager", streamed=streamed, **options)


def learned(model: CausalModel) -> list[torch.Tensor]:
    """The loss and the gradients of two rows."""
    assert model.adapter is not None
    ids, positions = torch.arange(1, 41) % tiny.VOCAB, torch.arange(20).repeat(2)
    rows = (positions < 19).nonzero()[:, 0]
    micro = Micro(ids, positions, (0, 20, 40), rows, ids[rows + 1], torch.arange(2), step=0)
    for parameter in model.adapter.parameters():
        parameter.grad = None
    loss = model.loss(micro)
    loss.backward()  # type: ignore[no-untyped-call]
    return [loss.detach(), *(p.grad for p in model.adapter.parameters() if p.grad is not None)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 1 and all(map(torch.equal, one, other))


def whole(config: Any, tied: bool) -> Any:
    """A tiny model of one block."""
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": tiny.VOCAB}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return AutoModelForCausalLM.from_config(config(**sizes, tie_word_embeddings=tied))


def test_an_embedding_waits_in_host_memory_that_is_read_by_rows_as_they_are() -> None:
    from transformers import Gemma2Config, GemmaConfig, LlamaConfig

    module = whole(LlamaConfig, tied=False)
    expected = module.get_input_embeddings()(IDS)
    assert offload.embedding_bytes(module) == 4 * 32 * tiny.VOCAB
    offload.embedding_to_host(module, torch.device("cpu"))
    assert torch.equal(module.get_input_embeddings()(IDS), expected)
    for config, tied in ((LlamaConfig, True), (GemmaConfig, False), (Gemma2Config, False)):
        module = whole(config, tied)
        assert offload.embedding_bytes(module) == 0
        with pytest.raises(AssertionError):
            offload.embedding_to_host(module, torch.device("cpu"))


@pytest.mark.parametrize("recompute", [0, 2, True])
@pytest.mark.parametrize("count", [1, 3, BLOCKS])
def test_our_blocks_learn_the_same_from_weights_that_come_and_go(count: int, recompute: bool | int) -> None:
    expected = learned(ours(recompute=recompute))
    model = ours(stream=count, recompute=recompute)
    assert same(learned(model), expected)
    assert model.decoder is not None
    assert model.decoder.streamed is not None
    before = model.decoder.streamed.fetches
    assert same(learned(model), expected)
    # The last two are there when the way back begins, and the first two when the next step does.
    assert model.decoder.streamed.fetches == before + 2 * max(0, count - 2)


def test_weights_that_come_and_go_are_in_memory_twice_and_not_as_often_as_there_are_blocks() -> None:
    model = ours(stream=BLOCKS)
    weights = [p for p in model.module.model.layers.parameters() if p.dtype == torch.uint8]
    assert len({p.untyped_storage()._cdata for p in weights}) == 2


@pytest.mark.parametrize("count", [1, 3, BLOCKS])
def test_answers_and_what_may_follow_weigh_the_same_bits_as_with_weights_that_stay(count: int) -> None:
    prompts, sampling = [[5, 6, 7, 8], [9, 10]], Sampling(max_new_tokens=6)
    models = ours(), ours(stream=count, embedding=True)
    found = [
        generate(model, prompts, sampling, frozenset(), continuations=[[[3, 4], [1]], [[8, 7, 6]]]) for model in models
    ]
    assert found[0] == found[1]  # tokens and likelihoods
    assert all(is_fast(model) for model in models)


@torch.inference_mode()
def test_dense_blocks_that_come_and_go_answer_the_same_and_are_not_copied_to_be_merged() -> None:
    whole, _, _ = model()
    module, _, streamed = model(BLOCKS)
    one, other = CausalModel(whole, None), CausalModel(module, None, streamed=streamed)
    assert streamed is not None
    plain, ours = FastDecoder(one, merge=False), FastDecoder(other, merge=True)
    before = streamed.fetches
    for step in (lambda decoder: decoder.prefill([[5, 6, 7], [9, 10]], 2), lambda decoder: decoder.step(IDS[0, :2])):
        assert torch.equal(step(plain), step(ours))
    assert streamed.fetches == before + 2 * BLOCKS  # each block's weights came for each of the two


def test_a_lookup_in_host_memory_learns_the_same() -> None:
    assert same(learned(ours(embedding=True)), learned(ours()))


@pytest.mark.parametrize(("recompute", "gate_up"), [(0, 0), (True, 0), (1, 2)])
@pytest.mark.parametrize("away", [1, 2, BLOCKS])
def test_what_waits_in_host_memory_comes_back_as_it_was(away: int, recompute: bool | int, gate_up: int) -> None:
    options: Any = {"recompute": recompute, "recompute_gate_up": gate_up}
    expected, model = learned(ours(**options)), ours(away=away, **options)
    assert all(same(learned(model), expected) for _ in range(3))


def test_two_losses_may_be_on_their_way_at_a_time() -> None:
    model, whole = ours(away=3, recompute=True), ours(recompute=True)
    found = []
    for one in (model, whole):
        assert one.adapter is not None
        ids = torch.arange(1, 21)
        rows = torch.arange(19)
        owner = torch.zeros(1, dtype=torch.int64)
        micros = [Micro(x, torch.arange(20), (0, 20), rows, x[1:], owner, step=0) for x in (ids, ids + 5)]
        losses = [one.loss(micro) for micro in micros]
        for loss in losses:
            loss.backward()  # type: ignore[no-untyped-call]
        found.append([p.grad for p in one.adapter.parameters() if p.grad is not None])
    assert same(*found)


def test_what_has_not_left_when_it_is_wanted_stays() -> None:
    """Where all blocks send theirs away, two parcels are on their way when the backward pass begins."""
    away, kept, at_most = Away(BLOCKS, BLOCKS, torch.device("cpu")), list(torch.arange(8.0 * BLOCKS).split(8)), 0
    kept = [x.clone() for x in kept]
    away.begin()
    parcels: list[Any] = []
    for number, x in enumerate(kept):
        away.enter(number)
        parcels.append(away.send(number, [x]))
    found = []
    for number in reversed(range(BLOCKS)):
        away.call(number, parcels[number])
        at_most = max(at_most, sum(bool(parcel._pieces) for parcel in parcels))
        found += parcels[number].take()
    assert all(map(torch.equal, found, kept[::-1]))
    assert [x.data_ptr() == y.data_ptr() for x, y in zip(found, kept[::-1], strict=True)] == [True, True, False, False]
    assert at_most == 2


@pytest.mark.parametrize("gradients", [True, False])
def test_any_pass_begins_without_what_another_one_left(gradients: bool) -> None:
    """Of a backward pass that failed, or never came, copies may be on their way to memory that is there again."""
    model, ids = ours(away=BLOCKS), torch.arange(1, 21)
    micro = Micro(ids, torch.arange(20), (0, 20), torch.arange(19), ids[1:], torch.zeros(1, dtype=torch.int64), step=0)
    assert model.decoder is not None
    assert model.decoder.away is not None
    model.loss(micro)
    left = model.decoder.away.newest
    assert left is not None
    with torch.set_grad_enabled(gradients):
        model.loss(micro)
    assert not left._pieces
    assert model.decoder.away.newest is not left


def test_parts_of_one_piece_of_memory_come_back_as_parts_of_one() -> None:
    lane, whole = Lane(torch.device("cpu")), torch.arange(40.0).view(5, 8)
    parcel = Parcel([whole[:, :6], None, whole[:, 6:], torch.arange(3)], lane, Shelf(lane.device), None)
    parcel.leave()
    wide, nothing, narrow, other = parcel.take()
    assert nothing is None
    assert wide is not None
    assert narrow is not None
    assert other is not None
    assert torch.equal(torch.cat([wide, narrow], 1), whole)
    assert torch.equal(other, torch.arange(3))
    assert wide.untyped_storage()._cdata == narrow.untyped_storage()._cdata != whole.untyped_storage()._cdata


def test_host_memory_is_pinned_once_and_lent_again() -> None:
    """Pieces lie across chunks, whatever their sizes."""
    lane, shelf = Lane(torch.device("cpu")), Shelf(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for sizes in ((3 * CHUNK + 5, 7, CHUNK - 3), (1, 2 * CHUNK), (3 * CHUNK, CHUNK - 600, 601)):
        whole = [torch.randint(256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]
        parcel = Parcel(whole, lane, shelf, None)
        parcel.leave()
        assert all(map(torch.equal, parcel.take(), whole))
        del parcel
        assert shelf.chunks == 5
    two = [Parcel(torch.full((2, 2 * CHUNK), float(i)).unbind(), lane, shelf, None) for i in range(2)]
    assert shelf.chunks > 5
    for value, parcel in enumerate(two):
        parcel.leave()
        assert all(bool((x == value).all()) for x in parcel.take() if x is not None)


def test_where_memory_is_short_unpacked_values_go_first_and_no_bit_changes() -> None:
    expected, model = learned(ours()), ours(unpacked=BLOCKS)
    assert same(learned(model), expected)
    assert model.decoder is not None
    for _ in range(BLOCKS):
        assert model.keep_less()
        assert {block.recompute for block in model.decoder.blocks} == {"nothing"}
        assert same(learned(model), expected)
    assert not any(linear.kept for block in model.decoder.blocks for linear in block.linears)
    assert model.keep_less()
    assert [block.recompute for block in model.decoder.blocks] == ["gate_up", *["nothing"] * (BLOCKS - 1)]
    assert same(learned(model), expected)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ((), []),
        (("unpacked",), []),
        (("recompute",), [["all", "nothing", "nothing", "nothing"], ["all", "all", "nothing", "nothing"]]),
        (("recompute", "recompute_gate_up"), [["gate_up", *["nothing"] * 3], ["gate_up", "gate_up", *["nothing"] * 2]]),
    ],
    ids=str,
)
def test_what_the_recipe_says_is_kept_is_kept(free: tuple[str, ...], expected: list[list[str]]) -> None:
    model = ours()
    assert model.decoder is not None
    found = [[block.recompute for block in model.decoder.blocks] for _ in range(2) if model.keep_less(free)]
    assert found == expected


def test_a_recipe_leaves_to_the_plan_what_it_does_not_say() -> None:
    def left(*changes: str) -> set[str]:
        return left_open(tiny.recipe(*changes).run)

    assert left() == {"unpacked", "recompute", "recompute_gate_up"}
    assert left("run.unpacked=3", "run.recompute_gate_up=2") == {"recompute"}
    assert left("run.recompute=false") == {"unpacked"}


def test_the_blocks_of_a_model_are_found_by_their_size() -> None:
    assert offload.blocks_name(model()[0]) == "model.layers"
