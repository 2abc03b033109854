from __future__ import annotations

import torch

from library.nn.patches import patch_rows, unpatchify


def test_a_patch_is_row_column_channel():
    x = torch.arange(2 * 3 * 4 * 6).float().view(2, 3, 4, 6)
    rows = patch_rows(x, 2)
    assert rows.shape == (2, 6, 12)
    second = x[1, :, 0:2, 2:4]  # the patch right of the first one
    assert torch.equal(rows[1, 1], second.permute(1, 2, 0).flatten())


def test_back_is_the_same_picture():
    x = torch.randn(2, 16, 8, 6)
    assert torch.equal(unpatchify(patch_rows(x, 2), x.shape, 2), x)
