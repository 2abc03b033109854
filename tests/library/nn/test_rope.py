from __future__ import annotations

import pytest
import torch

from library.nn.rope import apply_rope, apply_rope_pairs, pair_table, rope_angles, rope_table, rotate_pairs


def test_pairs_turn_by_their_angle():
    x = torch.randn(2, 5, 3, 8)  # (B, N, H, K)
    angles = rope_angles(5, 8, 10000.0, x.device)
    turned = apply_rope(x, rope_table(angles))
    pairs = torch.complex(x[..., :4], x[..., 4:])  # half-split: j with j + K/2
    expected = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), dim=-1))


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(16), torch.randn(16)
    table = rope_table(rope_angles(12, 16, 10000.0, q.device))
    turned_q, turned_k = (apply_rope(v.expand(1, 12, 1, 16), table)[0, :, 0] for v in (q, k))
    torch.testing.assert_close(turned_q[7] @ turned_k[4], turned_q[10] @ turned_k[7])


def test_bf16_is_turned_in_fp32():
    x = torch.randn(1, 300, 1, 8).bfloat16()
    table = rope_table(rope_angles(300, 8, 10000.0, x.device))
    turned = apply_rope(x, table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rope(x.float(), table).bfloat16())


def test_gradient_is_the_numerical_one():
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    table = rope_table(rope_angles(3, 4, 100.0, x.device))
    table = type(table)(table.cos.double(), table.sin.double())
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, table), (x,))


@pytest.mark.parametrize("apply", [apply_rope_pairs, rotate_pairs])
@pytest.mark.parametrize("own_positions", [False, True])
def test_neighbours_turn_by_their_angle(apply, own_positions):
    x = torch.randn(2, 5, 3, 8)  # (B, N, H, K)
    angles = rope_angles(5, 8, 10000.0, x.device).double()
    angles = torch.stack((angles, angles.flip(0))) if own_positions else angles
    turned = apply(x, pair_table(angles))
    expected = torch.view_as_complex(x.double().unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles).unsqueeze(
        -2
    )
    torch.testing.assert_close(turned, torch.view_as_real(expected).flatten(-2).float())


def test_pairs_in_bf16_are_turned_in_fp32():
    x = torch.randn(1, 300, 1, 8).bfloat16()
    table = pair_table(rope_angles(300, 8, 10000.0, x.device))
    turned = apply_rope_pairs(x, table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rope_pairs(x.float(), table).bfloat16())


def test_gradient_of_pairs_is_the_numerical_one():
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    table = pair_table(rope_angles(3, 4, 100.0, x.device)).double()
    assert torch.autograd.gradcheck(lambda x: apply_rope_pairs(x, table), (x,))
