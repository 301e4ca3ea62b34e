"""Which metrics change with the unit of the map."""

import pytest
import torch

import fastfg
from fastfg.metrics import METRICS
from fastfg.metrics.explanation_metric import ExplanationMetric


@pytest.mark.parametrize(
    "name", [name for name, metric in METRICS.items() if not issubclass(metric, ExplanationMetric)]
)
def test_a_map_in_other_units(name):
    """A map times 4, which is exact, has another score only where the metric says that it depends on the scale."""

    def model(images):
        left = images[..., :8].mean((1, 2, 3))
        return torch.stack([left, images.std((1, 2, 3)) - left], dim=1)

    random = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 16, 16, generator=random, dtype=torch.float64)
    maps = torch.rand(2, 4, 4, generator=random, dtype=torch.float64)
    inside = torch.zeros(2, 16, 16, dtype=torch.bool)
    inside[:, :8, 4:] = True
    options = {"masks": inside} if hasattr(METRICS[name], "masks") else {}
    scores = [fastfg.evaluate(model, images, m, target=0, metrics=[name], **options)[name] for m in (maps, 4 * maps)]
    assert scores[0].isfinite().all()
    same = torch.allclose(*scores, rtol=1e-9, atol=1e-12)
    assert same != METRICS[name].depends_on_scale
