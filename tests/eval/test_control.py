"""A shuffled NAMM has the same values as the trained one, and none of its places."""

from __future__ import annotations

import torch

from namm_transfer import NAMM
from namm_transfer.eval.language.control import shuffled
from namm_transfer.network import unflatten


def test_each_part_keeps_its_values_in_another_order() -> None:
    namm = NAMM.from_pretrained("default")
    control, again, other = shuffled(namm, 3), shuffled(namm, 3), shuffled(namm, 4)
    assert control.fingerprint() == again.fingerprint() != other.fingerprint()
    torch.testing.assert_close(control.feature_var, namm.feature_var)
    for mixed, trained in zip(*(unflatten(n.to_vector().unsqueeze(0)) for n in (control, namm)), strict=True):
        torch.testing.assert_close(mixed.flatten().sort().values, trained.flatten().sort().values)
        if trained.numel() > 1:
            assert (mixed != trained).float().mean() > 0.9


def test_the_trained_one_is_left_alone() -> None:
    namm = NAMM.from_pretrained("default")
    before = namm.fingerprint()
    shuffled(namm, 0)
    assert namm.fingerprint() == before
