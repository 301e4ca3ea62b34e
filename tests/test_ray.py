"""``fastfg.ray``: one row per image, whatever the images are, alone and in Ray's actors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import fastfg
from fastfg.models.timm import import_timm, preprocessing
from fastfg.ray import Explain
from tests.tools import random_sae


def make():
    torch.manual_seed(0)
    return import_timm().create_model("test_vit", num_classes=4).eval()


def make_saes():
    return {1: random_sae(64, 128, "topk", k=8, seed=1, dtype=torch.float32)}


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (n, 70, 90, 3), dtype=np.uint8)


def encoded(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def test_maps_and_scores_are_those_of_attribute_and_evaluate():
    gate = fastfg.Gate((1,))
    explain = Explain(make, saes=make_saes, gate=gate, metrics=["srg"], srg={"patches_per_step": 50})
    images = pictures(3)
    found = explain({"id": ["a", "b", "c"], "image": images})
    model = make()
    tensors = torch.stack([preprocessing(model)(Image.fromarray(image)) for image in images])
    result = fastfg.attribute(model, tensors, saes=make_saes(), gate=gate)
    scores = fastfg.evaluate(
        model, tensors, result.maps, target=result.target, metrics=["srg"], srg={"patches_per_step": 50}
    )
    assert found["id"] == ["a", "b", "c"]
    np.testing.assert_array_equal(found["map"], result.maps.numpy())
    np.testing.assert_array_equal(found["target"], result.target.numpy())
    np.testing.assert_allclose(found["probability"], result.logits.softmax(-1).amax(-1), rtol=1e-6)
    np.testing.assert_array_equal(found["srg"], scores["srg"].numpy())
    assert list(found["error"]) == ["", "", ""]
    as_bytes = explain({"id": [0, 1, 2], "image": [encoded(image) for image in images]})
    as_input = explain({"id": [0, 1, 2], "image": tensors.numpy()})
    for other in (as_bytes, as_input):
        np.testing.assert_array_equal(other["map"], found["map"])


def test_images_that_cannot_be_read_have_a_row():
    images = [encoded(image) for image in pictures(2)]
    batch = {"id": np.arange(4), "image": [images[0], images[0][:100], images[1], b"no image"]}
    explain = Explain(make)
    found = explain(batch)
    assert found["id"].tolist() == [0, 1, 2, 3]
    assert np.isnan(found["map"]).all((1, 2)).tolist() == [False, True, False, True]
    assert found["target"].tolist()[1::2] == [-1, -1]
    assert np.isnan(found["probability"]).tolist() == [False, True, False, True]
    assert found["error"][1].startswith("OSError: ")
    assert found["error"][3] == "UnidentifiedImageError: cannot identify image file 'bytes'"
    assert found["map"].shape == (4, 10, 10)
    assert explain({"id": [0], "image": [b""]})["map"].shape == (1, 10, 10)


def test_a_score_that_says_nothing_has_an_error():
    blank = np.full((1, 70, 90, 3), 7, np.uint8)
    found = Explain(make, metrics=["srg", "saco"])({"id": [0], "image": blank})
    assert np.isnan(found["srg"]).all()
    assert "srg: " in found["error"][0]
    assert "; saco: " in found["error"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "test_vit"}, "weights: expected a file for the name of a model"),
        ({"model": make, "weights": "a.pt"}, "weights: expected a file for the name of a model, and none for a func"),
        ({"model": make, "metrics": ["sacco"]}, "metrics: expected names among .*, got 'sacco'"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Explain(**arguments)


def test_batches_are_checked():
    explain = Explain(make)
    with pytest.raises(ValueError, match=r"batch: expected the columns 'image' and 'id', got no 'id' in \['image'\]"):
        explain({"image": pictures(1)})
    found = explain({"id": [0], "image": np.zeros((1, 5, 5, 4), np.uint8)})
    assert found["error"][0].startswith("ValueError: image: expected bytes, uint8 [H, W, 3]")


@pytest.fixture(scope="module")
def ray():
    """Ray on two CPUs of this machine."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # else the actors wait for every other process of the machine
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield ray
        ray.shutdown()


@pytest.mark.slow
def test_two_actors_return_each_image_once(ray):
    images = pictures(10)
    rows = [{"id": f"image-{n}", "image": encoded(images[n])} for n in range(10)]
    rows[4]["image"] = b"no image"
    found = (
        ray.data.from_items(rows, override_num_blocks=5)
        .map_batches(
            Explain,
            fn_constructor_kwargs={"model": make},
            batch_size=2,
            compute=ray.data.ActorPoolStrategy(size=2),
        )
        .take_all()
    )
    assert sorted(row["id"] for row in found) == sorted(row["id"] for row in rows)
    expected = Explain(make)({"id": list(range(10)), "image": [row["image"] for row in rows]})
    for row in found:
        n = int(row["id"].removeprefix("image-"))
        assert row["target"] == expected["target"][n]
        assert row["error"] == expected["error"][n]
        np.testing.assert_allclose(row["map"], expected["map"][n], rtol=1e-4, atol=1e-6)
