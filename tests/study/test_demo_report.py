"""The demo claims against the controls that it ran, all of them and no others."""

import numpy as np
import pandas as pd
import pytest

from fastfg.study.demo.report import METHOD, VARIANTS, judged
from fastfg.study.demo.run import Settings


def scores(variants, n=12):
    """One metric, in which the method is ahead of everything else by about 1."""
    random = np.random.default_rng(0)
    rows = [
        {
            "index": i,
            "image": f"cell-{i}",
            "variant": name,
            "target": 1,
            "pixel_flipping": -float(name == METHOD) + noise,
        }
        for name in variants
        for i, noise in enumerate(random.normal(scale=0.05, size=n))
    ]
    table = pd.DataFrame(rows)
    table.attrs["metrics"] = ["pixel_flipping"]
    return table


@pytest.mark.parametrize("thorough", [False, True])
def test_a_method_that_beats_all_that_ran_is_said_to(thorough):
    settings = Settings(thorough=thorough)
    ran = [*settings.gates(), *settings.methods]
    claim, tables = judged(scores(ran), settings)
    assert claim.holds, claim.sentence
    assert "no scores" not in claim.sentence
    assert list(tables) == ["vanilla", METHOD]
    assert set(ran) == set(VARIANTS) if thorough else set(ran) < set(VARIANTS)


def test_a_control_that_failed_is_not_beaten():
    settings = Settings()
    table = scores(settings.gates())
    table.loc[table["variant"] == "shuffled decoder", "pixel_flipping"] = np.nan
    claim, _ = judged(table, settings)
    assert not claim.holds
    assert "shuffled decoder has no scores" in claim.sentence
