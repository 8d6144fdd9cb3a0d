"""The GGUF reader: right on good files, quick to refuse bad ones, whatever is wrong with them."""

from __future__ import annotations

import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from luthier.errors import ModelError
from luthier.model import gguf
from luthier.model.gguf import Gguf

F32, Q4_1, Q8_0 = 0, 3, 8
U32, STRING, ARRAY, U64 = 4, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def strings(values: list[str]) -> bytes:
    return struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values))


def tensor(name: str, dimensions: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A tensor record; `dimensions` innermost first, as the file has them."""
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


def container(pairs: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return header + b"\0" * (-len(header) % 32) + data


PAIRS = [
    pair("general.architecture", STRING, text("llama")),
    pair("general.alignment", U32, struct.pack("<I", 32)),
    pair("tokens", ARRAY, strings(["a", "b", "ü"])),
    pair("numbers", ARRAY, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
    pair("big", U64, struct.pack("<Q", 2**63)),
]
WEIGHTS = np.arange(8, dtype="<f4")
Q8_BLOCK = np.float16(0.5).tobytes() + np.arange(-16, 16, dtype=np.int8).tobytes()
Q4_BLOCK = np.float16(2).tobytes() + np.float16(-1).tobytes() + bytes(range(16, 32))
TENSORS = [
    tensor("plain", (4, 2), F32, 0),
    tensor("eight", (32,), Q8_0, 32),
    tensor("four", (32, 1), Q4_1, 96),
]
DATA = WEIGHTS.tobytes() + Q8_BLOCK.ljust(64, b"\0") + Q4_BLOCK
GOOD = container(PAIRS, TENSORS, DATA)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], Gguf]:
    def write_and_open(data: bytes) -> Gguf:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return Gguf(path)

    return write_and_open


def test_a_good_file_is_read_as_it_was_written(opened: Callable[[bytes], Gguf]) -> None:
    file = opened(GOOD)
    assert file.metadata["tokens"] == ["a", "b", "ü"]
    assert file.metadata["numbers"] == [1, -2, 3]
    assert file.metadata["big"] == 2**63
    np.testing.assert_array_equal(file.tensor("plain"), WEIGHTS.reshape(2, 4))
    np.testing.assert_array_equal(file.tensor("eight"), np.arange(-16, 16) * np.float32(0.5))
    low, high = np.arange(16), np.ones(16)
    np.testing.assert_array_equal(file.tensor("four"), [np.concatenate([low, high]) * 2 - 1])


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "GGUF"),
    "another format": (b"PK\x03\x04" + GOOD[4:], "GGUF"),
    "magic alone": (b"GGUF", "ends within"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + GOOD[8:], "big-endian"),
    "version 1": (container([], [], version=1), "version"),
    "2^64-1 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 0) + b"\0" * 64, "tensors"),
    "2^63 pairs": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + b"\0" * 64, "pairs"),
    "a string past the end": (container([pair("k", STRING, struct.pack("<Q", 2**40))], []), "string"),
    "a key longer than keys may be": (container([pair("k" * 70_000, U32, b"\0" * 4)], []), "longer"),
    "a key that is not UTF-8": (container([text(b"\xff") + struct.pack("<II", U32, 0)], []), "UTF-8"),
    "a key twice": (container([PAIRS[0], PAIRS[0]], []), "twice"),
    "an unknown type": (container([pair("k", 13, b"\0" * 8)], []), "unknown"),
    "an array of arrays": (container([pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 20)], []), "arrays"),
    "an array past the end": (container([pair("k", ARRAY, struct.pack("<IQ", U64, 2**61))], []), "items"),
    "a string array past the end": (container([pair("k", ARRAY, struct.pack("<IQ", STRING, 2**60))], []), "items"),
    "an alignment of 0": (container([pair("general.alignment", U32, b"\0" * 4)], TENSORS, DATA), "alignment"),
    "an alignment of 33": (container([pair("general.alignment", U32, b"\x21\0\0\0")], TENSORS, DATA), "alignment"),
    "a text as alignment": (container([pair("general.alignment", STRING, text("32"))], TENSORS, DATA), "alignment"),
    "no dimensions": (container([], [tensor("t", (), F32, 0)], DATA), "dimensions"),
    "five dimensions": (container([], [tensor("t", (1,) * 5, F32, 0)], DATA), "dimensions"),
    "a product that overflows": (container([], [tensor("t", (2**32, 2**32), F32, 0)], DATA), "past the end"),
    "a dimension of 0": (container([], [tensor("t", (0, 4), F32, 0)], DATA), "shape"),
    "half a block": (container([], [tensor("t", (48,), Q8_0, 0)], DATA), "shape"),
    "an unknown tensor type": (container([], [tensor("t", (4,), 99, 0)], DATA), "type 99"),
    "an offset past the end": (container([], [tensor("t", (4,), F32, 2**63)], DATA), "past the end"),
    "a crooked offset": (container([], [tensor("t", (4,), F32, 4)], DATA), "aligned"),
    "a tensor twice": (container([], [TENSORS[0], TENSORS[0]], DATA), "twice"),
    "tensors on top of each other": (container([], [TENSORS[0], tensor("t", (4,), F32, 0)], DATA), "overlaps"),
    "51 bytes that hang the gguf package": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair("a", ARRAY, struct.pack("<IQ", 4, 2**62)) + b"\0\0",
        "items",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_refused_at_once_with_the_reason(name: str, opened: Callable[[bytes], Gguf]) -> None:
    data, reason = BAD[name]
    start = time.process_time()
    with pytest.raises(ModelError, match=reason):
        opened(data)
    assert time.process_time() - start < 1


def test_every_truncation_is_refused(opened: Callable[[bytes], Gguf]) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(ModelError):
            opened(GOOD[:length])


def test_mutated_headers_are_read_or_refused_in_bounded_time_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD)
    rng = random.Random(0)
    header = len(GOOD) - len(DATA)
    odd = [0, 1, 0x7F, 0x80, 0xFF]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest = refused = 0.0
    for _ in range(4000):
        data = bytearray(GOOD)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(4, header)
            width = rng.choice([1, 1, 2, 4, 8])
            data[at : at + width] = bytes(rng.choice([*odd, rng.randrange(256)]) for _ in range(width))
        with path.open("r+b") as out:  # not truncated: that is what takes time here
            out.write(data)
        start = time.process_time()
        try:
            file = Gguf(path)
            for name in file.entries:
                file.tensor(name)
        except ModelError:
            refused += 1
        slowest = max(slowest, time.process_time() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert refused > 1000
    assert slowest < 1
    assert grown < 100_000


def test_a_large_file_of_tiny_values_stays_within_the_budget(opened: Callable[[bytes], Gguf]) -> None:
    many = gguf.MAX_VALUES + 1
    with pytest.raises(ModelError, match="array items"):
        opened(container([pair("k", ARRAY, struct.pack("<IQ", 0, many) + b"\0" * many)], []))


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    import torch

    rng = np.random.default_rng(0)
    values = np.concatenate([rng.standard_normal(10_000), [0.0, -0.0, 1.00390625, 1.01171875, 3e38]]).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(gguf._bfloat16(values), expected)


def tiny_llama(family: str = "llama", pre: str = "smollm") -> bytes:
    """A whole Llama of one block: hidden 32, 2 heads of 16, 1 key head, no quantised tensor but the embedding."""
    tokens = ["<|im_start|>", "<|im_end|>", "a", "b", "ab", "1"]
    numbers = {
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.block_count": 1,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.rope.dimension_count": 16,
        "llama.context_length": 64,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
    }
    texts = {"general.architecture": family, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    pairs = [pair(k, U32, struct.pack("<I", v)) for k, v in numbers.items()]
    pairs += [pair(k, STRING, text(v)) for k, v in texts.items()]
    pairs += [
        pair("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
        pair("llama.rope.freq_base", 6, struct.pack("<f", 1e5)),
        pair("tokenizer.ggml.tokens", ARRAY, strings(tokens)),
        pair("tokenizer.ggml.merges", ARRAY, strings(["a b"])),
        pair("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ6i", 5, 6, 3, 3, 1, 1, 1, 1)),
        pair("tokenizer.chat_template", STRING, text("{{ messages }}")),
    ]
    shapes = {
        "token_embd": (32, 6),
        "output_norm": (32,),
        **{f"blk.0.{n}": (32,) for n in ("attn_norm", "ffn_norm")},
        **{f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")},
        **{f"blk.0.{n}": (32, 16) for n in ("attn_k", "attn_v")},
    }
    records, data = [], b""
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        records.append(tensor(f"{name}.weight", shape, F32, len(data)))
        data += rng.standard_normal(shape).astype("<f4").tobytes()
    return container(pairs, records, data)


def test_a_llama_becomes_a_folder_that_transformers_reads(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    (tmp_path / "tiny.gguf").write_bytes(tiny_llama())
    folder = tmp_path / "hf"
    folder.mkdir()
    gguf.convert(tmp_path / "tiny.gguf", folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.generation_config.eos_token_id == 1
    assert model.config.rms_norm_eps == 1e-5
    weights = load_file(folder / "model.safetensors")
    q = torch.from_numpy(Gguf(tmp_path / "tiny.gguf").tensor("blk.0.attn_q.weight").copy())
    rows = [head * 16 + 2 * i + half for head in (0, 1) for half in (0, 1) for i in range(8)]
    assert torch.equal(weights["model.layers.0.self_attn.q_proj.weight"], q[rows].bfloat16())


def test_digits_are_split_before_spaces_are_joined(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    (tmp_path / "tiny.gguf").write_bytes(tiny_llama())
    gguf.convert(tmp_path / "tiny.gguf", tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("a  2024")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.encode("ab<|im_end|>").ids == [4, 1]


def test_another_family_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(tiny_llama(family="phi3x"))
    with pytest.raises(ModelError, match="holds a phi3x model"):
        gguf.convert(tmp_path / "tiny.gguf", tmp_path)


def test_an_unknown_tokenizer_is_refused_with_the_way_out_which_works(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(tiny_llama().replace(b"smollm", b"qwen99"))
    folder = tmp_path / "hf"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"gpt2/qwen99.*put the model's tokenizer\.json .* beside it"):
        gguf.convert(tmp_path / "tiny.gguf", folder)
    (tmp_path / "tokenizer.json").write_text("mine")
    gguf.convert(tmp_path / "tiny.gguf", folder)
    assert (folder / "tokenizer.json").read_text() == "mine"


def test_the_tokenizer_of_llama_3_keeps_three_digits_together_and_whole_words_unmerged(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    (tmp_path / "tiny.gguf").write_bytes(tiny_llama(pre="llama-bpe"))
    gguf.convert(tmp_path / "tiny.gguf", tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("It's 20245 x\n\n y")
    assert [piece for piece, _ in pieces] == ["It", "'s", "Ġ", "202", "45", "Ġx", "ĊĊ", "Ġy"]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_stored_numbers_are_what_the_gguf_package_makes_of_them(kind: str) -> None:
    package = pytest.importorskip("gguf")
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    theirs = package.GGMLQuantizationType[kind]
    raw = np.ascontiguousarray(package.quants.quantize(values, theirs)).view(np.uint8).reshape(-1)
    mine = gguf.KINDS[int(theirs)]
    assert mine.name == kind
    assert raw.size == values.size // mine.values * mine.size
    expected = package.quants.dequantize(raw.reshape(4, -1), theirs)
    np.testing.assert_array_equal(gguf._dequantise(raw, mine).reshape(4, 64), expected)


def test_a_gguf_file_is_a_base_and_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.model.load import model_folder
    from luthier.recipe import Model

    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.gguf").write_bytes(tiny_llama())
    said: list[str] = []
    base = Model(base=str(tmp_path / "tiny.gguf"))
    folder = model_folder(base, said.append)
    assert model_folder(base, said.append) == folder
    assert len(said) == 1
    (tmp_path / "tiny.gguf").write_bytes(tiny_llama(pre="llama-bpe"))
    assert model_folder(base, said.append) != folder
    with pytest.raises(ModelError, match="no such folder or file"):
        model_folder(Model(base=str(tmp_path / "missing.gguf")))


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(tiny_llama().replace(b"ffn_gate", b"../../up"))
    with pytest.raises(ModelError, match=r"\.\./\.\./up"):
        gguf.convert(tmp_path / "tiny.gguf", tmp_path)
