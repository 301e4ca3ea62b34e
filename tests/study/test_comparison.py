"""``compare`` returns the scores of several variants in one tidy table."""

import pytest
import torch

import fastfg
from fastfg.study import compare_batch
from tests.tools import random_sae

GATES = {"vanilla": None, "real": fastfg.Gate((1, 2)), "shuffled": fastfg.Gate((1, 2), shuffle_seed=12345)}
COLUMNS = ["index", "image", "variant", "target", "saco", "faithfulness_correlation", "pixel_flipping"]


def test_one_row_per_image_and_variant(model, images, saes):
    found = compare_batch(model, images, saes=saes, gates=GATES, keys=["a", "b", "c"], saco={"n_bins": 5})
    table = found.scores
    assert list(table.columns) == COLUMNS
    assert len(table) == 9
    alone = fastfg.attribute(model, images, saes=saes, gate=GATES["real"])
    scores = fastfg.evaluate(model, images, alone.maps, target=alone.target, keys=["a", "b", "c"], saco={"n_bins": 5})
    real = table[table["variant"] == "real"]
    assert list(real["image"]) == ["a", "b", "c"]
    torch.testing.assert_close(torch.tensor(real["saco"].to_numpy()), scores["saco"], rtol=1e-9, atol=1e-12)
    assert len(found.errors) == 0


def test_any_number_of_images_in_one_table(model, images, saes, monkeypatch):
    options = {"saes": saes, "gates": GATES, "keys": ["a", "b", "c"], "target": [1, 0, 2], "saco": {"n_bins": 5}}
    whole = compare_batch(model, images, **options).scores
    monkeypatch.setattr("fastfg.study.comparison.IMAGES_ON_CPU", 2)
    seen = []
    table = fastfg.compare(model, images, progress=lambda done, total: seen.append((done, total)), **options)
    assert seen == [(2, 3), (3, 3)]
    assert list(table.columns) == [*COLUMNS, "error"]
    assert table["error"].isna().all()
    streamed = fastfg.compare(model, (image[None] for image in images), **options)
    for found in (table, streamed):
        assert list(found["index"]) == list(whole["index"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert list(found["image"]) == list(whole["image"])
        assert list(found["target"]) == [1, 1, 1, 0, 0, 0, 2, 2, 2]
        for metric in COLUMNS[4:]:
            torch.testing.assert_close(
                torch.tensor(found[metric].to_numpy()), torch.tensor(whole[metric].to_numpy()), rtol=1e-9, atol=1e-12
            )


def test_saes_of_each_gate_by_its_name(model, images, saes):
    others = {block: random_sae(32, 100, "topk", k=9, seed=9 + block) for block in (1, 2)}
    gates = {"vanilla": None, "trained": GATES["real"], "random": GATES["real"]}
    found = compare_batch(model, images, gates=gates, saes={"random": others, "trained": saes})
    for name, own in (("vanilla", None), ("trained", saes), ("random", others)):
        alone = fastfg.attribute(model, images, saes=own, gate=gates[name])
        torch.testing.assert_close(found.maps[name], alone.maps, rtol=1e-9, atol=1e-12)
    assert not torch.equal(found.maps["trained"], found.maps["random"])
    with pytest.raises(
        ValueError, match=r"saes: expected names of gates, 'vanilla', 'trained', 'random', got \['tained'\]"
    ):
        fastfg.compare(model, images, gates=gates, saes={"tained": saes, "random": others})
    with pytest.raises(ValueError, match=r"saes: expected \{block: SparseAutoencoder\} for 'random', got none"):
        fastfg.compare(model, images, gates=gates, saes={"trained": saes})


def test_missing_scores_have_a_reason(model, images, saes, monkeypatch):
    attribute = fastfg.attribute

    def broken(*args, **options):
        result = attribute(*args, **options)
        result.maps[1, 2, 0, 0] = torch.nan
        return result

    monkeypatch.setattr("fastfg.study.comparison.attribute", broken)
    table = fastfg.compare(model, images, saes=saes, gates=GATES, keys=["a", "b", "c"], metrics=["saco"])
    missing = table[table["saco"].isna()]
    assert list(zip(missing["image"], missing["variant"], missing["error"], strict=True)) == [
        ("c", "real", "saco: the attribution is not finite")
    ]
    assert table["error"].notna().sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": ["a", "b"]}, "keys: expected one per image, got 2 for 3 images or more"),
        ({"keys": ["a", "b", "c", "d"]}, "keys: expected 3 of them, one per image, got 4"),
        ({"target": [1]}, "target: expected one per image, got 1 for 3 images or more"),
    ],
)
def test_keys_and_targets_are_one_per_image(model, images, options, message):
    with pytest.raises(ValueError, match=message):
        fastfg.compare(model, images, gates={"vanilla": None}, metrics=["saco"], **options)


def test_batches_are_tensors_and_there_is_one(model):
    with pytest.raises(TypeError, match="images: expected tensors .* got list in batch 0"):
        fastfg.compare(model, [[1, 2]], gates={"vanilla": None})
    with pytest.raises(ValueError, match="images: expected at least one batch, got none"):
        fastfg.compare(model, [], gates={"vanilla": None})


def test_a_data_loader_of_images_and_labels(model, images, saes):
    loader = torch.utils.data.DataLoader(list(zip(images, [0, 1, 2], strict=True)), batch_size=2)
    options = {"saes": saes, "gates": GATES, "metrics": ["saco"]}
    found = fastfg.compare(model, loader, **options)
    assert found.equals(fastfg.compare(model, [images[:2], images[2:]], **options))
    assert len(found) == 9


def test_arguments_that_hold_one_entry_per_image_follow_the_batches(model, images, monkeypatch):
    subsets = torch.rand(2, 5, 3, 24, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :4]
    options = {
        "gates": {"vanilla": None},
        "metrics": ["faithfulness_correlation", "pixel_flipping"],
        "faithfulness_correlation": {"subsets": subsets},
        "pixel_flipping": {"patches_per_step": 5},
        "baseline": torch.arange(9.0).reshape(3, 3),
    }
    whole = fastfg.compare(model, images, **options)
    monkeypatch.setattr("fastfg.study.comparison.IMAGES_ON_CPU", 2)
    parts = fastfg.compare(model, images, **options)
    for metric in options["metrics"]:
        assert parts[metric].tolist() == pytest.approx(whole[metric].tolist(), rel=1e-9)
    with pytest.raises(
        ValueError, match="faithfulness_correlation: expected subsets for 3 images .* got \\[2, 5, 4, 4"
    ):
        fastfg.compare(
            model, images, **options | {"faithfulness_correlation": {"subsets": subsets[:, :, [0, 1, 2, 0]]}}
        )
    with pytest.raises(ValueError, match="expected baseline for 3 images or more .* got \\[2\\]"):
        fastfg.compare(model, images, **options | {"baseline": torch.zeros(2)})


@pytest.mark.parametrize("whole_images", [False, True])
def test_starts_of_integrated_gradients_follow_the_batches(model, images, monkeypatch, whole_images):
    """One colour or picture per image, cut to each batch, and to the images that a metric explains again."""
    starts = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)
    starts = images.roll(1, 0) if whole_images else starts
    options = {"methods": ["integrated_gradients"], "metrics": ["saco", "max_sensitivity"]}
    options |= {"max_sensitivity": {"n_samples": 1}, "saco": {"n_bins": 4}, "target": 1}

    def starting_at(baseline):
        return {"integrated_gradients": {"steps": 2, "baseline": baseline}}

    whole = fastfg.compare(model, images, **options, **starting_at(starts))
    monkeypatch.setattr("fastfg.study.comparison.IMAGES_ON_CPU", 2)
    parts = fastfg.compare(model, images, **options, **starting_at(starts))
    for metric in options["metrics"]:
        assert parts[metric].tolist() == pytest.approx(whole[metric].tolist(), rel=1e-9)
    for wrong, message in ((starts[:2], "expected one per image, got 2 for 3"), (starts[[0, 1, 2, 0]], "got 4")):
        with pytest.raises(ValueError, match=f"integrated_gradients.baseline: .*{message}"):
            fastfg.compare(model, images, **options, **starting_at(wrong))


def test_the_same_image_under_two_keys_is_explained_again_as_each(model, images):
    """``random`` depends on the key, so equal pixels do not say which map is to be made again."""
    twice = images[[0, 0, 1]]
    options = {"methods": ["random"], "metrics": ["random_logit"], "target": 1}
    table = fastfg.compare(model, twice, keys=["a", "b", "c"], **options)
    assert table["random_logit"].notna().all()
    swapped = fastfg.compare(model, twice, keys=["b", "a", "c"], **options)
    rows = [t.set_index(["image", "variant"])["random_logit"] for t in (table, swapped)]
    assert rows[0].to_dict() == pytest.approx(rows[1].to_dict(), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"identity": "paper"},
            "unexpected argument 'identity'; expected options of metrics and methods by their name",
        ),
        ({"seed": 1.0}, "seed: expected an int, got 1.0"),
        ({"seed": True}, "seed: expected an int, got True"),
        ({"methods": None}, r"methods: expected a list of names among \(.*got None"),
        ({"methods": "random"}, r"methods: expected a list of names among \(.*got 'random'"),
        ({"methods": ["grad_cam"], "grad_cam": {"layer": 0.5}}, "grad_cam.layer: expected a block, an int .* got 0.5"),
    ],
)
def test_wrong_arguments_are_named(model, images, options, message):
    for function in (fastfg.compare, compare_batch):
        with pytest.raises(TypeError, match=message):
            function(model, images[:1], **({"metrics": ["saco"]} | options))


def test_names_of_variants_are_text(model, images):
    with pytest.raises(ValueError, match=r"gates: expected names as text, got \[0\]"):
        fastfg.compare(model, images, gates={0: None, "a": fastfg.Gate((1,), score="gradient_x_residual")})


def test_a_column_that_is_added_is_not_judged(model, images):
    table = fastfg.compare(model, images, methods=["random"], metrics=["saco"], saco={"n_bins": 4})
    assert set(fastfg.study.paired(table)["metric"]) == {"saco"}
    with pytest.raises(ValueError, match=r"metrics: expected the names .* as \['age'\] may be no metrics"):
        fastfg.study.paired(table.assign(age=range(len(table))))


def test_images_that_share_a_key_keep_their_own_errors(model, images):
    images = images.clone()
    images[1] = 0.5  # blank
    table = fastfg.compare(model, images, gates={"vanilla": None}, keys=["a", "a", "a"], metrics=["saco"])
    assert table["error"].isna().tolist() == [True, False, True]
    assert table["error"][1] == "saco: the image is blank: all its pixels are the same"
    assert table["saco"].isna().tolist() == [False, True, False]


def test_gates_methods_and_maps_from_elsewhere_in_one_table(model, images, saes, monkeypatch):
    given = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    broken = given.clone()
    broken[2, 0, 0] = torch.nan
    methods = {
        "noise": "random",
        "centre": "centre",
        "given": given,
        "broken": broken,
        "own": lambda x, t: x[:, 0, ::8, ::8],
    }
    options = {"saes": saes, "gates": GATES, "keys": ["a", "b", "c"], "metrics": ["saco"], "seed": 5, "target": 1}
    options |= {"saco": {"n_bins": 5}, "centre": {"width": 0.5}}
    found = compare_batch(model, images, methods=methods, **options)
    variants = [*GATES, *methods]
    assert list(found.maps) == variants
    assert list(found.scores["variant"][: len(variants)]) == variants
    assert found.attribution.maps.shape == (3, 3, 4, 6)
    assert torch.equal(found.maps["given"], given)
    alone = fastfg.evaluate(model, images, given, target=1, metrics=["saco"], saco={"n_bins": 5}, seed=5)["saco"]
    table = found.scores.set_index(["variant", "index"])["saco"]
    assert table["given"].tolist() == pytest.approx(alone.tolist(), rel=1e-9)
    assert found.errors[["variant", "index", "message"]].to_numpy().tolist() == [
        ["broken", 2, "the attribution is not finite"]
    ]
    monkeypatch.setattr("fastfg.study.comparison.IMAGES_ON_CPU", 2)
    parts = fastfg.compare(model, images, methods=methods, **options)
    assert parts["saco"].tolist() == pytest.approx(found.scores["saco"].tolist(), rel=1e-9, nan_ok=True)
    only = fastfg.compare(model, images, methods=(name for name in ["random"]), metrics=["saco"])
    assert list(only["variant"]) == ["vanilla", "random"] * 3
    with pytest.raises(ValueError, match=r"methods\['given'\]: expected 3 of them, one per image, got 4"):
        fastfg.compare(model, images, methods={"given": given[[0, 1, 2, 0]]}, metrics=["saco"])
    with pytest.raises(ValueError, match=r"methods: expected other names than those of the gates, got \['real'\]"):
        fastfg.compare(model, images, methods={"real": "random"}, **options | {"centre": None})
    with pytest.raises(ValueError, match="gates: expected {name: Gate or None} with at least one of them, got {}"):
        fastfg.compare(model, images, gates={}, methods=["random"])


def test_groups_are_a_column(model, images, monkeypatch):
    monkeypatch.setattr("fastfg.study.comparison.IMAGES_ON_CPU", 2)
    table = fastfg.compare(model, images, groups=(g for g in ("p", "q", "p")), metrics=["saco"])
    assert list(table.columns) == ["index", "image", "group", "variant", "target", "saco", "error"]
    assert list(table["group"]) == ["p", "q", "p"]
    with pytest.raises(ValueError, match="groups: expected 3 of them, one per image, got 4"):
        fastfg.compare(model, images, groups=[1, 2, 3, 4], metrics=["saco"])
    with pytest.raises(ValueError, match="groups: expected 3 of them, one per image, got 2"):
        compare_batch(model, images, groups=[1, 2], metrics=["saco"])


@pytest.mark.parametrize("metric", ["srg", "max_sensitivity"])  # one from masks, one that explains again
def test_some_variants_are_scored(model, images, saes, metric):
    options = {"saes": saes, "gates": GATES, "methods": ["edges"], "metrics": [metric], "keys": ["a", "b", "c"]}
    whole = compare_batch(model, images, **options)
    some = compare_batch(model, images, scored=("real", "edges"), **options)
    expected = whole.scores[whole.scores["variant"].isin(["real", "edges"])]
    assert list(some.scores["variant"]) == ["real", "edges"] * 3
    torch.testing.assert_close(
        torch.tensor(some.scores[metric].to_numpy()), torch.tensor(expected[metric].to_numpy()), rtol=1e-4, atol=1e-6
    )
    assert list(some.maps) == list(whole.maps)
