"""Run by test_varlen_backward.py: prints, for each gradient, its relative distance from autograd's."""

from itertools import accumulate, pairwise

import torch
from interpreted import allow_ends_of_one_value
from torch import Tensor

from luthier.kernels import pointwise, reference, varlen_forward
from luthier.kernels.ends import Ends
from luthier.kernels.varlen_backward import Blocks, How, launched, places

allow_ends_of_one_value()

LENGTHS = (1, 7, 35, 0, 16, 3)
SCALE = 0.3


def logarithms(q: Tensor, k: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """[Hq, T]: of the sums of exponentials."""
    found = []
    for start, end in pairwise(bounds):
        keys = k[start:end].repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * SCALE
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        found.append(scores.masked_fill(~seen, -torch.inf).logsumexp(-1))
    return torch.cat(found, 1)


torch.manual_seed(0)
bounds = (0, *accumulate(LENGTHS))
ends = Ends(torch.tensor(bounds, dtype=torch.int32), max(LENGTHS) + 5)
SMALL, WIDE, HIGH = Blocks(16, 16, 1, 1), Blocks(16, 32, 1, 1), Blocks(32, 16, 1, 1)
CASES = ((4, 2, 16, How(HIGH, WIDE)), (3, 3, 24, How(SMALL, SMALL)), (4, 1, 32, How(WIDE, HIGH)))
for heads, groups, size, how in (*CASES, (6, 2, 32, How(SMALL, WIDE, apart=True))):
    merged = torch.randn(bounds[-1], heads + 2 * groups, size)
    q, k, v = torch.split(merged, [heads, groups, groups], 1)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    filled = tuple(dict.fromkeys(bounds))
    o, do = reference.segment_attention(*leaves, filled, SCALE), torch.randn(bounds[-1], heads, size)
    wanted = torch.autograd.grad(o, leaves, do)
    wanted_sums = logarithms(q, k, filled)
    made, sums = torch.empty_like(q), torch.empty_like(wanted_sums)
    varlen_forward.launched(q, k, v, places(ends, len(q), how.queries.rows), SCALE, made, sums, how.queries)
    print(f"{heads}.{groups}.o", float((made - o).detach().norm() / o.detach().norm()))
    print(f"{heads}.{groups}.sums", float((sums - wanted_sums).norm() / wanted_sums.norm()))
    dy = torch.full((bounds[-1], heads + 2 * groups + 1, size), torch.nan)  # with room behind, which is left alone
    found = torch.split(dy, [heads, groups, groups, 1], 1)
    tables = [places(ends, len(q), blocks) for blocks in (how.queries.rows, how.keys.keys)]
    cos, sin = torch.randn(2, len(q), size // 2)
    turned = [x.clone() for x in wanted]
    for x in turned[:2]:
        pointwise.turn(x, cos, sin, True, False)
    # The sums as flash attention and as cuDNN leave them.
    cases = [(wanted_sums, None, None, wanted), (wanted_sums.t().contiguous().t(), None, None, wanted)]
    if size != 24:
        cases[1] = (cases[1][0], cos, sin, turned)
    for sums, *rotation, right in cases:
        room = torch.empty_like(sums), torch.empty(2, *q.shape) if how.apart else None
        launched(do, o.detach(), sums, q, k, v, *tables, ends.longest, SCALE, *rotation, *room, *found[:3], how)
        for name, one, other in zip("qkv", found[:3], right, strict=True):
            print(f"{heads}.{groups}.{sums.stride(0)}.{name}", float((one - other).norm() / other.norm()))
    assert found[3].isnan().all()
