"""Means of variants that were judged on different numbers of images."""

import pandas as pd
import torch

from fastfg.report.table import table_cells
from fastfg.study import paired, summarize


def test_a_variant_of_fewer_images_says_so_and_is_not_bold():
    random = torch.Generator().manual_seed(0)
    few = torch.rand(40, generator=random)
    rows = [
        {"image": str(i), "variant": name, "saco": float(few[i]) + gain}
        for name, n, gain in (("vanilla", 40, 0.0), ("gated", 40, 0.5), ("shuffled", 20, 0.9))
        for i in range(n)
    ]
    scores = pd.DataFrame(rows)
    scores.attrs["metrics"] = ["saco"]
    (means,) = table_cells(summarize(scores), paired(scores))
    assert [cell.best for (cell,) in means.rows.values()] == [False, True, False]
    assert means.rows["shuffled"][0].text.endswith("(n = 20)")
    assert "n =" not in means.rows["gated"][0].text
