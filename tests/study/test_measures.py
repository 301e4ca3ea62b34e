"""Variants judged in several modes at once: masks reach only the measures that compare maps with them."""

import torch

from fastfg.models import adapt
from fastfg.study.measures import Measure, judge


def test_masks_for_the_first_mode_alone(model, images):
    measures = [*Measure.of(["srg", "pointing_game"], "mean", 6), *Measure.of(["srg"], "removed", 6)]
    maps = torch.zeros(1, 3, 4, 6)
    maps[:, :, 0, 0] = 1
    masks = torch.zeros(3, 32, 48)
    masks[:2, :8, :8] = 1  # the pixels of the first patch
    masks[2, 8:, 8:] = 1
    options = {"target": None, "keys": list("abc"), "seed": 0}
    judged = judge(adapt(model), images, maps, ["map"], measures, masks=masks, **options)
    hits = [row["score"] for row in judged.rows if row["measure"] == "pointing_game mean"]
    assert hits == [1.0, 1.0, 0.0]
    curves = judge(adapt(model), images, maps, ["map"], [one for one in measures if one.metric == "srg"], **options)
    assert [row for row in judged.rows if row["measure"] != "pointing_game mean"] == curves.rows
