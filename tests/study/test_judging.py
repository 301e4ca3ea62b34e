"""What stops the judging of a split."""

from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pytest

from fastfg.study import judging
from fastfg.study.measures import Measure
from fastfg.study.variants import Variant


def test_a_split_without_a_readable_image_is_named(monkeypatch):
    monkeypatch.setattr(judging, "run_units", lambda *given, **more: None)
    config = SimpleNamespace(
        run=SimpleNamespace(unit=4),
        data=SimpleNamespace(max_failures=1.0),
        model=SimpleNamespace(target="predicted"),
        test=SimpleNamespace(metrics=[]),
    )
    parts = SimpleNamespace(images=pd.DataFrame(index=list("abcde")), validation=list("abcde"), identities={})
    store = SimpleNamespace(read=lambda **given: pa.table({}))
    own = judging.Judging(config, parts, store, lambda title: print)
    with pytest.raises(ValueError, match=r"data.manifest: expected validation images that can be read, got none of 5"):
        own.scores("Layers", "validation", [Variant("vanilla")], [Measure("srg", "mean")])
