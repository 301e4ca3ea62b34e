"""``FeatureGradient`` has Captum's interface, and works in Quantus."""

import numpy as np
import pytest
import torch

import fastfg
from tests.tools import tiny_vit


def test_pixels_hold_their_patchs_relevancy(model, images, saes, gate):
    maps = fastfg.attribute(model, images, saes=saes, gate=gate, target=2).maps
    pixels = fastfg.FeatureGradient(model, saes, gate).attribute(images, target=torch.tensor([[2], [2], [2]]))
    assert pixels.shape == (3, 1, 32, 48)
    assert torch.equal(pixels[:, 0, ::8, ::8], maps)
    assert torch.equal(pixels[:, 0, 7::8, 7::8], maps)
    for rows, columns in ((4, 4), (7, 0)):  # anywhere in a patch
        assert torch.equal(pixels[:, 0, rows::8, columns::8], maps)


def test_bilinear_pixels_lie_between_their_patches(model, images, saes, gate):
    method = fastfg.FeatureGradient(model, saes, gate, interpolation="bilinear")
    maps = fastfg.attribute(model, images, saes=saes, gate=gate, target=2).maps
    smooth = method.attribute(images, target=2)
    assert smooth.shape == (3, 1, 32, 48)
    assert torch.equal(smooth[:, 0, 0, 0], maps[:, 0, 0])  # outside of all centres, the value of the nearest patch
    # 8 pixels per patch: pixel 11 is 0.5 pixels before the centre of patch 1, at 12, which is 8 away from patch 0's
    expected = 0.0625 * maps[:, 0, 0] + 0.9375 * maps[:, 0, 1]
    torch.testing.assert_close(smooth[:, 0, 0, 11], expected, rtol=1e-9, atol=0)


def test_pixels_beyond_the_last_whole_patch():
    """37 x 51 pixels are 4 x 6 patches of 8 x 8; the last 5 rows and 3 columns belong to no patch."""
    model = tiny_vit(img_size=(37, 51))
    images = torch.randn(2, 3, 37, 51, dtype=torch.float64)
    maps = fastfg.attribute(model, images, target=2).maps
    pixels = fastfg.FeatureGradient(model).attribute(images, target=2)
    assert pixels.shape == (2, 1, 37, 51)
    assert torch.equal(pixels[:, 0, :32, :48], maps.repeat_interleave(8, 1).repeat_interleave(8, 2))
    assert (pixels[:, 0, 32:] == 0).all()
    assert (pixels[:, 0, :, 48:] == 0).all()
    smooth = fastfg.FeatureGradient(model, interpolation="bilinear")
    assert torch.equal(smooth.attribute(images, target=2)[:, 0, -1, -1], maps[:, -1, -1])
    assert smooth.attribute(images[:0], target=2).shape == (0, 1, 37, 51)


def test_arguments_reach_attribute(model, images, saes, gate):
    """The gate, the SAEs, the target and further options all reach ``fastfg.attribute``."""
    gated = fastfg.FeatureGradient(model, saes, gate, identity="paper").attribute(images, target=2)[:, 0, ::8, ::8]
    expected = fastfg.attribute(model, images, saes=saes, gate=gate, target=2, identity="paper").maps
    assert torch.equal(gated, expected)
    for other in ({"identity": "transmm", "target": 2}, {"identity": "paper", "target": 1}):
        assert not torch.equal(gated, fastfg.attribute(model, images, saes=saes, gate=gate, **other).maps)
    assert not torch.equal(gated, fastfg.attribute(model, images, target=2, identity="paper").maps)


def test_wrong_arguments_are_named(model):
    with pytest.raises(ValueError, match="interpolation: expected one of .* got 'cubic'"):
        fastfg.FeatureGradient(model, interpolation="cubic")
    with pytest.raises(TypeError, match="gate: expected one fastfg.Gate or None, got list"):
        fastfg.FeatureGradient(model, gate=[None])


def test_it_works_with_captums_methods_and_metrics(model, images):
    captum = pytest.importorskip("captum")
    from captum.attr import InputXGradient, visualization

    assert captum.__version__
    method = fastfg.FeatureGradient(model)
    for attributor in (InputXGradient(model), method):  # one loop over both: the same call
        attributions = attributor.attribute(images, target=1)
        assert attributions.shape[0] == 3
        assert attributions.shape[-2:] == images.shape[-2:]
    pixels = method.attribute(images, target=1)[0].permute(1, 2, 0).numpy()
    figure, _ = visualization.visualize_image_attr(pixels, sign="positive", use_pyplot=False)
    assert figure.axes


def test_gradient_x_input_is_captums(model, images):
    pytest.importorskip("captum")
    from captum.attr import InputXGradient

    expected = InputXGradient(model).attribute(images, target=1).sum(1)
    expected = expected.unflatten(-1, (6, 8)).unflatten(1, (4, 8)).sum((2, 4))
    found = fastfg.attribute(model, images, target=1, methods=["gradient_x_input"])
    torch.testing.assert_close(found.methods["gradient_x_input"], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.maps, fastfg.attribute(model, images, target=1).maps, rtol=1e-12, atol=0)


def test_quantus_explain_func(model, images):
    quantus = pytest.importorskip("quantus")

    def explain(model, inputs, targets, **_):
        pixels = torch.as_tensor(inputs).double()
        return fastfg.FeatureGradient(model).attribute(pixels, target=torch.as_tensor(targets)).numpy()

    class Model(torch.nn.Module):
        """Quantus passes float32 images."""

        def __init__(self):
            super().__init__()
            self.vit = model

        def forward(self, x):
            return self.vit(x.double())

    metric = quantus.FaithfulnessCorrelation(
        nr_runs=10, subset_size=64, disable_warnings=True, perturb_baseline="black", return_aggregate=False
    )
    scores = metric(
        model=Model().eval(),
        x_batch=images.float().numpy(),
        y_batch=np.array([1, 2, 0]),
        explain_func=lambda model, inputs, targets, **_: explain(model.vit, inputs, targets),
        device="cpu",
    )
    assert len(scores) == 3
    assert np.isfinite(scores).all()
