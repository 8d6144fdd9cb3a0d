"""Dropout masks are a function of what is dropped, not of how a step is cut."""

from __future__ import annotations

import torch

from luthier.kernels.dropout import dropout_mask
from luthier.kernels.reference import dropped

SAMPLES = torch.arange(20).repeat_interleave(25)
POSITIONS = torch.arange(25).repeat(20)


def mask(**changes: object) -> torch.Tensor:
    given: dict[str, object] = {"seed": 3, "step": 7, "samples": SAMPLES, "positions": POSITIONS, "module": 5}
    given |= {"features": 50, "p": 0.1, "dtype": torch.float32} | changes
    return dropout_mask(**given)  # type: ignore[arg-type]


def test_the_mask_equals_its_plain_twin_value_for_value() -> None:
    rows, columns = [0, 24, 25, 133, 499], [0, 1, 2, 3, 4, 47, 49]
    for p in (0.1, 0.5):
        made = mask(p=p)
        for row in rows:
            sample, position = int(SAMPLES[row]), int(POSITIONS[row])
            twin = [dropped(3, 7, sample, position, 5, column, p) for column in columns]
            assert (made[row, columns] == 0).tolist() == twin


def test_the_twin_is_not_constant() -> None:
    assert len({dropped(3, 7, 0, 0, 5, feature, 0.5) for feature in range(20)}) == 2


def test_a_cut_of_the_step_leaves_every_token_its_mask() -> None:
    whole, order = mask(), torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mask(samples=SAMPLES[order], positions=POSITIONS[order]), whole[order])
    assert torch.equal(mask(samples=SAMPLES[100:130], positions=POSITIONS[100:130]), whole[100:130])


def test_the_mask_depends_on_each_part_of_its_key() -> None:
    whole = mask()
    others = [{"seed": 4}, {"step": 8}, {"samples": SAMPLES + 1}, {"positions": POSITIONS + 1}, {"module": 6}]
    for change in others:
        same = (mask(**change) == whole).float().mean()
        assert 0.80 < same < 0.84, change  # independent masks agree on 0.9² + 0.1²


def test_the_share_dropped_is_p_and_the_mean_is_one() -> None:
    for p in (0.05, 0.1, 0.5):
        made = mask(p=p, features=2000)
        assert abs((made == 0).float().mean() - p) < 0.001
        assert abs(made.mean() - 1) < 0.003


def test_neighbouring_features_and_tokens_are_uncorrelated() -> None:
    zeros = (mask(p=0.5, features=2000) == 0).float() - 0.5
    for shifted in (zeros[1:] * zeros[:-1], zeros[:, 1:] * zeros[:, :-1], zeros[:, 4:] * zeros[:, :-4]):
        assert abs(shifted.mean()) < 0.001


def test_seeds_of_any_size_are_taken() -> None:
    for seed in (0, -1, 2**63, 2**64 - 1):
        assert mask(seed=seed).shape == (500, 50)
