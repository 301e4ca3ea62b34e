"""Masks that tell the order of patches."""

import pytest
import torch

from fastfg.perturb.masks import asymmetric_halves, other_orders

GRIDS = [(gh, gw) for gh in range(1, 9) for gw in range(1, 9) if gh * gw > 1] + [(14, 14), (1, 196), (16, 37)]


@pytest.mark.parametrize(("gh", "gw"), GRIDS)
def test_halves_without_a_symmetry(gh, gw):
    masks = asymmetric_halves(gh, gw)
    assert masks.shape == (2, gh * gw)
    assert masks.any(1).all()
    assert not masks.all(1).any()
    assert masks.any(0).all()  # each patch is removed
    grids = masks.unflatten(1, (gh, gw))
    kept = torch.arange(gh * gw).reshape(gh, gw)
    for k in range(4):
        for mirror in (False, True):

            def turn(t, k=k, mirror=mirror):
                t = t.rot90(k, (-2, -1))
                return t.flip(-1) if mirror else t

            if not torch.equal(turn(kept).flatten(), kept.flatten()):
                assert not torch.equal(turn(grids).flatten(1), masks)


def test_other_orders():
    assert [order.tolist() for order in other_orders(1, 3)] == [[2, 1, 0]]
    assert len(other_orders(3, 3)) == 7
    assert [1, 0, 3, 2] in [order.tolist() for order in other_orders(2, 2)]
