from pathlib import Path

import torch
from safetensors.torch import save_file

from luthier.model.original import original


def test_weights_are_found_in_shards_with_and_without_the_prefix(tmp_path: Path) -> None:
    save_file(
        {"model.a.weight": torch.ones(2, 3), "model.q.weight": torch.ones(2, 3).to(torch.uint8)},
        tmp_path / "1.safetensors",
    )
    save_file({"b.weight": torch.zeros(3, 2)}, tmp_path / "2.safetensors")
    find = original(tmp_path)
    found, short = find("model.a"), find("transformer.b")
    assert found is not None
    assert torch.equal(found, torch.ones(2, 3))
    assert short is not None
    assert torch.equal(short, torch.zeros(3, 2))
    assert find("model.q") is None
    assert find("model.c") is None
