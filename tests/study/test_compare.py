"""Variants side by side, as one tidy table."""

import torch

import fastfg
from fastfg.study import compare


def test_a_row_an_image_and_variant(model, images, saes, gate):
    gates = {"vanilla": None, "real": gate, "shuffled": fastfg.Gate((1, 2), shuffle_seed=12345)}
    found = compare(model, images, saes=saes, gates=gates, keys=["a", "b", "c"], saco={"n_bins": 5})
    table = found.scores
    assert list(table.columns) == ["image", "variant", "target", "saco", "faithfulness_correlation", "pixel_flipping"]
    assert len(table) == 9
    alone = fastfg.attribute(model, images, saes=saes, gate=gate)
    scores = fastfg.evaluate(model, images, alone.maps, target=alone.target, keys=["a", "b", "c"], saco={"n_bins": 5})
    real = table[table["variant"] == "real"]
    assert list(real["image"]) == ["a", "b", "c"]
    torch.testing.assert_close(torch.tensor(real["saco"].to_numpy()), scores["saco"], rtol=1e-9, atol=1e-12)
    assert len(found.errors) == 0
