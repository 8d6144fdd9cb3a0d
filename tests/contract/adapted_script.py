"""Run by test_adapted.py: prints, for each result, its relative distance from the twin's."""

from itertools import product

import torch
from interpreted import allow_ends_of_one_value

from luthier.kernels import adapted, spare
from luthier.kernels.adapted import Blocks, Part

allow_ends_of_one_value()

SPARE = 64
ALONE = [Part((0, 48), (0, 5))]
THREE = [Part((0, 144), (0, 16)), Part((144, 176), (16, 24)), Part((176, 208), (24, 25))]
ONE_OFF = [Part((0, 96), (0, 8)), Part((160, 208), (8, 24))]
FULL = [*(Part((16 * i, 16 * i + 16), (8 * i, 8 * i + 8)) for i in range(7)), Part((112, 208), (56, 64))]


def error(one: torch.Tensor, twin: torch.Tensor) -> float:
    return float((one - twin).norm() / twin.norm())


torch.manual_seed(0)
# Of the last, parts are added up, of both sums more than the 8 at a time: 9 blocks, and 18 chunks.
CASES = [*product({"alone": ALONE, "three": THREE, "off": ONE_OFF, "full": FULL}.items(), (1, 64, 150))]
for (name, parts), tokens in (*CASES, (("three", THREE), 1100)):
    width = parts[-1].columns[1]
    B, inner = torch.zeros(width, SPARE + 7)[:, :SPARE], torch.randn(tokens, SPARE + 3)[:, :SPARE]
    for columns, ranks in parts:
        B[slice(*columns), slice(*ranks)] = torch.randn(columns[1] - columns[0], ranks[1] - ranks[0])
    for size, programs in ((32, 5), (64, 100)) if tokens < 1000 else ((16, 300),):
        blocks, found = Blocks(size, programs, 4, 2), []
        dy = spare.empty(B, tokens, width, SPARE).copy_(torch.randn(tokens, width))
        whole = spare.whole(dy, SPARE)
        for launched in (adapted.launched, lambda *arguments: adapted.one_by_one(*arguments[:-1])):
            whole[:, width:], dB = torch.nan, torch.full((width, SPARE), torch.nan)
            launched(dy, B, inner, parts, whole[:, width:], dB, blocks)
            found.append((whole[:, width:].clone(), *(dB[slice(*c), slice(*r)] for c, r in parts)))
        for i, (one, twin) in enumerate(zip(*found, strict=True)):
            print(f"{name}.{tokens}.{size}.{i}", error(one, twin))
