"""Reads GGUF files, and turns a Llama-family one into a folder that transformers and `tokenizers` understand.

The reader trusts nothing in the file: every count, length and range is checked against the file's size before anything
is read or allocated, so a malformed file is refused at once (the `gguf` package hangs on one of 51 bytes).
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import json
import mmap
import shutil
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from luthier.errors import ModelError

MAX_NAME = 65_535  # bytes of a metadata key, as the format says
MAX_TEXT = 1 << 24  # bytes of one metadata string
MAX_VALUES = 1 << 20  # metadata values and tensors of a whole file, array items included: bounds time and memory

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
CONTROL = 3  # the token type of control tokens


@dataclass(frozen=True, slots=True)
class Kind:
    """How a tensor type is stored: `values` numbers in each block of `size` bytes."""

    name: str
    values: int
    size: int


KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2),
    2: Kind("Q4_0", 32, 18),
    3: Kind("Q4_1", 32, 20),
    8: Kind("Q8_0", 32, 34),
    30: Kind("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file. `shape` has the outermost dimension first, `start` counts from the file's first byte."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    start: int
    size: int


class Gguf:
    """An open GGUF file: `metadata` by key, `entries` by tensor name. Raises ModelError if it is malformed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map(path)
        self.metadata, self.entries = _Header(self._bytes, path).read()

    def tensor(self, name: str) -> np.ndarray:
        """The tensor `name` dequantised to float32, in its own shape."""
        entry = self.entries[name]
        raw = np.frombuffer(self._bytes, np.uint8, entry.size, entry.start)
        return _dequantise(raw, entry.kind).reshape(entry.shape)

    def require(self, key: str) -> Any:
        """The metadata value of `key`. Raises ModelError if the file has none."""
        if key not in self.metadata:
            raise ModelError(f"has no metadata key '{key}'", where=str(self.path))
        return self.metadata[key]


def _map(path: Path) -> mmap.mmap | bytes:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:  # an empty file cannot be mapped
        return b""
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror})", where=str(path)) from error


class _Header:
    """A cursor over the header. Each `_take` is checked against the end of the file."""

    def __init__(self, data: mmap.mmap | bytes, path: Path) -> None:
        self.data, self.path, self.end = data, path, len(data)
        self.at = 0
        self.budget = MAX_VALUES

    def read(self) -> tuple[dict[str, Any], dict[str, Entry]]:
        if self.data[:4] != b"GGUF":
            self._refuse("it does not start with 'GGUF'")
        self.at = 4
        version = self._number("I")
        if version not in (2, 3):
            self._refuse(f"version {version} is not 2 or 3, or the file is big-endian")
        tensors, pairs = self._number("Q"), self._number("Q")
        self._afford(tensors, 8 + 4 + 8 + 4 + 8, "tensors")
        self._afford(pairs, 8 + 4 + 1, "metadata pairs")
        metadata = self._metadata(pairs)
        shapes = [self._shape() for _ in range(tensors)]
        return metadata, self._entries(shapes, self._alignment(metadata))

    def _metadata(self, pairs: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._text(MAX_NAME)
            if key in metadata:
                self._refuse(f"the metadata key '{key}' is there twice")
            kind = self._number("I")
            metadata[key] = self._array() if kind == _ARRAY else self._value(kind)
        return metadata

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text(MAX_TEXT)
        if kind not in _SCALARS:
            self._refuse(f"metadata type {kind} is unknown")
        return self._number(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            self._afford(count, 8, "array items")
            return [self._text(MAX_TEXT) for _ in range(count)]
        if kind not in _SCALARS:
            self._refuse(f"arrays of metadata type {kind} are not supported")
        code = _SCALARS[kind]
        self._afford(count, struct.calcsize(code), "array items")
        return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(code))))

    def _shape(self) -> tuple[str, tuple[int, ...], Kind, int]:
        """One tensor record: name, shape (outermost first), kind, offset in the data section."""
        name = self._text(MAX_NAME)
        dimensions = self._number("I")
        if not 1 <= dimensions <= 4:
            self._refuse(f"tensor '{name}' has {dimensions} dimensions, not 1 to 4")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        kind, offset = self._number("I"), self._number("Q")
        if kind not in KINDS:
            known = ", ".join(k.name for k in KINDS.values())
            self._refuse(f"tensor '{name}' has type {kind}; luthier reads {known}, so take such a file of the model")
        if not all(shape) or shape[-1] % KINDS[kind].values:
            self._refuse(f"tensor '{name}' has the impossible shape {shape}")
        return name, shape, KINDS[kind], offset

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            self._refuse(f"alignment {alignment!r} is not a power of two from 8 to 65536")
        return alignment

    def _entries(self, shapes: list[tuple[str, tuple[int, ...], Kind, int]], alignment: int) -> dict[str, Entry]:
        first = -(-self.at // alignment) * alignment
        entries: dict[str, Entry] = {}
        for name, shape, kind, offset in shapes:
            size = prod(shape) // kind.values * kind.size  # Python integers: nothing to overflow
            if offset % alignment or first + offset + size > self.end:
                self._refuse(f"tensor '{name}' is not aligned, or reaches past the end of the file")
            if name in entries:
                self._refuse(f"the tensor '{name}' is there twice")
            entries[name] = Entry(name, shape, kind, first + offset, size)
        self._no_overlap(entries)
        return entries

    def _no_overlap(self, entries: dict[str, Entry]) -> None:
        # Without this a small file could hold a million names for one large tensor.
        reached = 0
        for entry in sorted(entries.values(), key=lambda e: e.start):
            if entry.start < reached:
                self._refuse(f"tensor '{entry.name}' overlaps another")
            reached = entry.start + entry.size

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize(code)))[0]

    def _text(self, limit: int) -> str:
        length = self._number("Q")
        if length > limit:
            self._refuse(f"a string of {length} bytes is longer than {limit}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            self._refuse("a string is not UTF-8")

    def _take(self, size: int) -> bytes:
        if size > self.end - self.at:
            self._refuse("it ends within its header")
        self.at += size
        return self.data[self.at - size : self.at]

    def _afford(self, count: int, size: int, what: str) -> None:
        """Refuses `count` things of at least `size` bytes each if the rest of the file, or the budget, is too small."""
        self.budget -= count
        if count * size > self.end - self.at or self.budget < 0:
            self._refuse(f"it cannot hold {count} {what}")

    def _refuse(self, why: str) -> NoReturn:
        raise ModelError(f"is not a GGUF file luthier can read: {why} (byte {self.at})", where=str(self.path))


def _dequantise(raw: np.ndarray, kind: Kind) -> np.ndarray:
    """float32 [n] from the stored blocks (uint8). The arithmetic and its order are ggml's, so results are bit-equal."""
    if kind.name == "F32":
        return raw.view("<f4")
    if kind.name == "F16":
        return raw.view("<f2").astype(np.float32)
    if kind.name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = raw.reshape(-1, kind.size)
    scale = blocks[:, 0:2].copy().view("<f2").astype(np.float32)
    if kind.name == "Q8_0":
        return (blocks[:, 2:].view(np.int8).astype(np.float32) * scale).reshape(-1)
    if kind.name == "Q4_0":
        return ((_nibbles(blocks[:, 2:]) - 8) * scale).reshape(-1)
    least = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
    return (_nibbles(blocks[:, 4:]) * scale + least).reshape(-1)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """float32 [blocks, 32]: the low halves of 16 bytes, then the high ones."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)


# The Llama family as Hugging Face lays it out.

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(path: Path, folder: Path) -> None:
    """Writes the Llama model at `path` into `folder` as transformers has it, weights in bfloat16.

    Files: config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and, where the
    model has one, chat_template.jinja. A tokenizer.json beside `path` is taken in place of the file's own tokenizer.
    Raises ModelError for another architecture, or a tokenizer that is not known and not beside the file.
    """
    file = Gguf(path)
    _check_family(file)
    texts = {"config.json": _config(file), "generation_config.json": _token_ids(file)}
    beside = path.with_name("tokenizer.json")
    if beside.is_file():
        for source in filter(Path.is_file, (beside, path.with_name("tokenizer_config.json"))):
            shutil.copyfile(source, folder / source.name)
    else:
        texts |= {"tokenizer.json": _tokenizer(file), "tokenizer_config.json": _tokenizer_config(file)}
    for name, tree in texts.items():
        (folder / name).write_text(json.dumps(tree, ensure_ascii=False, indent=None) + "\n", encoding="utf-8")
    if "tokenizer.chat_template" in file.metadata:
        (folder / "chat_template.jinja").write_text(file.metadata["tokenizer.chat_template"], encoding="utf-8")
    _write_weights(file, folder / "model.safetensors")


def _check_family(file: Gguf) -> None:
    if (found := file.require("general.architecture")) != "llama":
        fix = "give the model's original folder with config.json and .safetensors files"
        raise ModelError(f"holds a {found} model, and luthier converts llama only", where=str(file.path), fix=fix)
    if (scaling := file.metadata.get("llama.rope.scaling.type", "none")) != "none":
        fix = "give the model's original folder with config.json and .safetensors files"
        raise ModelError(f"has {scaling} positions, which are not converted", where=str(file.path), fix=fix)


def _write_weights(file: Gguf, path: Path) -> None:
    """A safetensors file in bfloat16, written tensor by tensor, so that memory holds one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in file.entries.values():
        start, end = end, end + 2 * prod(entry.shape)
        header[_name(file, entry.name)] = {"dtype": "BF16", "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in file.entries:
            out.write(_bfloat16(_weight(file, name)).data)


def _weight(file: Gguf, name: str) -> np.ndarray:
    """The tensor `name` with its rows in transformers' order."""
    if name.endswith("attn_q.weight"):
        return _unpermute(file.tensor(name), file.require("llama.attention.head_count"))
    if name.endswith("attn_k.weight"):
        return _unpermute(file.tensor(name), _key_heads(file))
    return file.tensor(name)


def _name(file: Gguf, name: str) -> str:
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _TOP and parts[1] == "weight":
        return f"{_TOP[parts[0]]}.weight"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _BLOCK and parts[3] == "weight":
        return f"model.layers.{int(parts[1])}.{_BLOCK[parts[2]]}.weight"
    raise ModelError(f"holds the tensor '{name}', which a Llama has no place for", where=str(file.path))


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k back to transformers' order: llama.cpp rotates neighbours, transformers rotates halves."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of finite float32 `values` rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _config(file: Gguf) -> dict[str, Any]:
    get = file.require
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": get("llama.embedding_length"),
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": get("llama.attention.head_count"),
        "num_key_value_heads": _key_heads(file),
        "head_dim": get("llama.rope.dimension_count"),
        "max_position_embeddings": get("llama.context_length"),
        "rms_norm_eps": _shortest(get("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(file.metadata.get("llama.rope.freq_base", 10_000.0)),
        "vocab_size": len(get("tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in file.entries,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
        **_token_ids(file),
    }


def _shortest(value: float) -> float:
    """The float32 `value` as a person wrote it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _key_heads(file: Gguf) -> int:
    count: int = file.metadata.get("llama.attention.head_count_kv") or file.require("llama.attention.head_count")
    return count


def _named(file: Gguf, names: dict[str, str]) -> dict[str, int]:
    """The token ids that the file gives under GGUF's names, by ours; `eos` has to be there."""
    file.require("tokenizer.ggml.eos_token_id")
    keys = {ours: f"tokenizer.ggml.{theirs}_token_id" for ours, theirs in names.items()}
    return {ours: file.metadata[key] for ours, key in keys.items() if key in file.metadata}


def _token_ids(file: Gguf) -> dict[str, int]:
    return _named(file, {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"})


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before merging, by `tokenizer.ggml.pre`. SmolLM splits digits one by one before the byte-level
# pattern; leaving that out changes the ids of texts with spaces before numbers.
_PIECES: dict[str, list[dict[str, Any]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    "gpt-2": [_BYTE_LEVEL],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA_3}, "behavior": "Isolated", "invert": False},
        _BYTE_LEVEL | {"use_regex": False},
    ],
}


def _tokenizer(file: Gguf) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE that `_PIECES` knows. Raises ModelError for another one."""
    kind, pre = file.require("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PIECES:
        fix = f"put the model's tokenizer.json (and tokenizer_config.json) beside it, in {file.path.parent}"
        raise ModelError(f"has a tokenizer of the kind {kind}/{pre}, not converted", where=str(file.path), fix=fix)
    tokens, kinds = file.require("tokenizer.ggml.tokens"), file.require("tokenizer.ggml.token_type")
    return {
        "version": "1.0",
        "added_tokens": [
            _control(i, token) for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PIECES[pre]},
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in file.require("tokenizer.ggml.merges")],
            **({"ignore_merges": True} if pre == "llama-bpe" else {}),
        },
    }


def _control(index: int, token: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": token, **flags}


def _tokenizer_config(file: Gguf) -> dict[str, Any]:
    tokens = file.require("tokenizer.ggml.tokens")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    key = "tokenizer.ggml.add_bos_token"
    return {
        **{name: tokens[index] for name, index in _named(file, names).items()},
        **({"add_bos_token": file.metadata[key]} if key in file.metadata else {}),
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it stands
        "model_max_length": file.require("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
