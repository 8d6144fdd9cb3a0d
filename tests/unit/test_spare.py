import pytest
import torch

from luthier.kernels import spare


def test_what_is_written_behind_rows_lies_beside_them_and_changes_none_of_their_values():
    x = spare.empty(torch.empty(0, dtype=torch.bfloat16), 3, 5, 2)
    x.fill_(1)
    behind = spare.whole(x, 2)[:, 5:]
    behind.fill_(2)
    assert x.shape == (3, 5)
    assert x.dtype == torch.bfloat16
    assert torch.equal(spare.whole(x, 2), torch.tensor([[1, 1, 1, 1, 1, 2, 2]] * 3, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(3, 5),
        torch.empty(3, 8)[:, :5],
        torch.empty(3, 7)[:, 2:],  # its last row has nothing behind it
        torch.empty(5, 3).t(),
    ],
)
def test_rows_without_such_columns_are_refused(x):
    assert not spare.has(x, 2)
    with pytest.raises(AssertionError):
        spare.whole(x, 2)


def test_no_spare_columns_are_the_rows_themselves():
    x = torch.empty(3, 5)
    assert spare.has(x, 0)
    assert spare.whole(x, 0).data_ptr() == x.data_ptr()
