"""The page shows the results, all of them, and no name can inject HTML."""

import base64
import hashlib
import re
from dataclasses import fields, replace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from fastfg.report import Claim, Condition, Contents, Effect, ImageEntry, Variant, write_report
from fastfg.report.charts import layer_charts
from fastfg.report.contents import FeatureEvidence
from fastfg.report.names import Names
from fastfg.report.page import CHARTS, file_name, shown
from fastfg.report.theme import DARK, LIGHT, darkened, render
from fastfg.study import paired, summarize
from tests.report import toy
from tests.report.reading import Page, numbers

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&$\\frac{$"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A report with every part but empty charts: its contents, its folder, and the page as it is read."""
    folder, contents = tmp_path_factory.mktemp("report"), toy.full()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastfg.report.page.render", lambda chart, theme, kind: b"")
        patch.setattr("fastfg.report.page.save_figure", lambda path, contents: path.write_bytes(b""))
        path = write_report(folder, contents)
    return contents, folder, Page(path.read_text(encoding="utf-8"))


def plain(n=6, **parts):
    scores = toy.scores(n)
    return Contents("Title", [Claim("A sentence.", None)], scores, **parts)


def test_every_part_has_its_section(full):
    _, _, page = full
    names = ("answer", "table", "difference", "layers", "combinations", "sweep", "curves", "shuffled")
    assert page.headings == [f"h-{name}" for name in (*names, "gallery", "ablation", "settings", "errors")]
    assert not page.open
    text = " ".join(page.texts)
    for said in ("Fails:", "Better than the strongest control.", "Could not be tested:", "n = 12"):
        assert said in text


@pytest.fixture
def undrawn(monkeypatch):
    """Reports with empty charts, which take no time to draw."""
    monkeypatch.setattr("fastfg.report.page.render", lambda chart, theme, kind: b"")
    monkeypatch.setattr("fastfg.report.page.save_figure", lambda path, contents: None)


def test_missing_parts_leave_nothing(tmp_path, undrawn):
    page = Page(write_report(tmp_path, plain()).read_text(encoding="utf-8"))
    assert page.headings == ["h-answer", "h-scores"]
    links = [given["href"] for tag, given in page.tags if tag == "a"]
    assert links == ["#main", "#h-answer", "#h-scores"]
    assert not any(tag in ("script", "dialog", "figure") for tag, _ in page.tags)
    parts = {f.name for f in fields(Contents)} - {"title", "claims", "scores"}
    everything, bare = toy.full(4, grid=2), plain(4)
    for part in sorted(parts):  # any one alone
        path = write_report(tmp_path / part, replace(bare, **{part: getattr(everything, part)}))
        assert "None" not in " ".join(Page(path.read_text(encoding="utf-8")).texts), part


def test_the_effects_say_how_many_groups(tmp_path, undrawn):
    effects = [Effect("gated", "vanilla", "srg", 0.1, 0.0, 0.2, 0.01, 30, "better", groups) for groups in (8, 30, None)]
    contents = replace(plain(), claims=[Claim("A sentence.", None, effects=effects)])
    said = [text for text in Page(write_report(tmp_path, contents).read_text(encoding="utf-8")).texts if "n = " in text]
    assert said == ["p = .010, n = 30 in 8 groups: better", *["p = .010, n = 30: better"] * 2]


def test_links_lead_to_headings_and_ids_are_unique(full):
    *_, page = full
    ids = [given["id"] for _, given in page.tags if "id" in given]
    assert len(set(ids)) == len(ids)
    for tag, given in page.tags:
        if tag == "a":
            assert given["href"][1:] in ids
        if "aria-labelledby" in given:
            assert given["aria-labelledby"] in {*ids, "patches-title"}  # the script makes the last one


def test_tables_say_what_the_tables_say(full):
    contents, _, page = full
    means = page.tables["Mean ± standard error over images"]
    assert means[0] == ["variant", "SRG ↑", "SaCo ↑", "Pixel Flipping ↓"]
    rows = {row[0]: row[1:] for row in means if len(row) == 4}
    summary = contents.summary.set_index(["variant", "metric"])
    for variant in toy.ROLES:
        for text, metric in zip(rows[variant], toy.METRICS, strict=True):
            one = summary.loc[(variant, metric)]
            assert text.split() == f"{one['mean']:.3f} ± {one['se']:.3f}{one['stars']}".split()
    seeds = summary.loc[[name for name in toy.SHIFT if name.startswith("shuffled")]].groupby("metric")["mean"]
    low, high = seeds.min()["srg"], seeds.max()["srg"]
    assert rows["5 shuffled decoders: mean (range)"][0] == f"{seeds.mean()['srg']:.3f} ({low:.3f} to {high:.3f})"
    for table, caption in ((contents.ranks, "The real decoder's rank"), (contents.errors, "Errors")):
        assert page.tables[caption][0] == [name.replace("_", " ") for name in table.columns]
        assert page.tables[caption][1:] == [[shown(v) for v in row] for row in table.itertuples(index=False, name=None)]
    for metric in toy.METRICS:
        layers = contents.layers[contents.layers["metric"] == metric]
        title = {"srg": "SRG", "saco": "SaCo", "pixel_flipping": "Pixel Flipping"}[metric]
        found = page.tables[f"{title} by gated block"]
        assert found[1:] == [[shown(v) for v in row] for row in layers.itertuples(index=False, name=None)]


def test_bold_is_the_best_and_really_better(full):
    contents, folder, _ = full
    page = (folder / "report.html").read_text(encoding="utf-8")
    real = contents.paired["vanilla"].query("verdict == 'better'")
    best = {m: contents.summary.query("metric == @m").set_index("variant")["mean"] for m in toy.METRICS}
    expected = [
        m
        for m, means in best.items()
        if (means.idxmin() if m == "pixel_flipping" else means.idxmax()) in set(real.query("metric == @m")["variant"])
    ]
    assert expected
    table = page[page.index('<h2 id="h-table"') : page.index("What the variants are")]
    assert table.count("<strong>") == len(expected)


def test_an_effect_is_that_of_the_paired_table(full):
    contents, _, page = full
    (row,) = contents.paired["vanilla"].query("variant == 'gated' and metric == 'srg'").to_dict("records")
    text = " ".join(page.texts)
    assert f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]" in text
    assert f"p = {row['p_holm']:.3f}".replace("0.", ".") in text or row["p_holm"] < 0.001


def test_parts_of_a_score_add_up_exactly(full):
    contents, _, page = full
    for image, entry in zip(page.data["images"], contents.images, strict=True):
        assert set(image["evidence"]) == set(map(str, entry.evidence))
        for block, one in image["evidence"].items():
            own = entry.evidence[int(block)]
            parts = numbers(one["contributions"], "<i4").reshape(-1, one["n"]).astype(np.int64)
            whole = {
                name: numbers(one[name], "<i4").astype(np.int64)
                for name in ("remaining", "scores", "bias", "error", "total")
            }
            assert (parts.sum(1) + whole["remaining"] == whole["scores"]).all()
            assert (whole["scores"] + whole["bias"] + whole["error"] == whole["total"]).all()
            smallest = np.abs(own.scores).max() * 1e-8
            np.testing.assert_allclose(whole["scores"] * one["quantum"], own.scores, rtol=0, atol=smallest)
            np.testing.assert_allclose(parts * one["quantum"], own.contributions, rtol=0, atol=smallest)
            np.testing.assert_allclose(whole["remaining"] * one["quantum"], own.remaining, rtol=0, atol=9 * smallest)
            np.testing.assert_allclose(numbers(one["gates"], "<f4"), own.gates, rtol=1e-6)
            assert (numbers(one["features"], "<i4").reshape(parts.shape) == own.features).all()


def test_parts_that_do_not_add_up_are_refused(tmp_path, undrawn):
    contents = toy.full(2)
    one = contents.images[0].evidence[4]
    wrong = replace(contents.images[0], evidence={4: replace(one, remaining=one.remaining + 0.01)})
    with pytest.raises(
        ValueError, match="evidence: expected parts that add up to the scores, got others at block 4 of"
    ):
        write_report(tmp_path, replace(contents, images=[wrong]))


def test_maps_and_scores_of_the_gallery(full):
    contents, _, page = full
    variants = [v["name"] for v in page.data["variants"]]
    assert variants == list(toy.ROLES)
    scores = contents.scores.set_index(["image", "variant"])[list(toy.METRICS)]
    for image, entry, found in zip(page.data["images"], contents.images, page.data["scores"], strict=True):
        for stored, name, own in zip(image["maps"], variants, found, strict=True):
            values = entry.maps[name]
            read = numbers(stored["values"], "<u2").reshape(values.shape) / 65535
            np.testing.assert_allclose(read, (values - values.min()) / np.ptp(values), atol=1e-5)
            assert own == pytest.approx(scores.loc[(entry.key, name)].tolist())


def test_a_map_with_nan_and_a_missing_score_are_nothing_and_not_zero(tmp_path, undrawn):
    contents = toy.full(3, explained=0)
    first = contents.images[0]
    broken = replace(first, maps=first.maps | {"gated": np.full((4, 4), np.nan)})
    table = contents.scores.copy()
    table.loc[(table["image"] == first.key) & (table["variant"] == "gated"), "srg"] = np.nan
    made = replace(contents, scores=table, images=[broken, *contents.images[1:]], features={}, ablations=None)
    page = Page(write_report(tmp_path, made).read_text(encoding="utf-8"))
    assert page.data["images"][0]["maps"][1] is None
    assert page.data["scores"][0][1][0] is None


def hostile():
    """A report whose every name is hostile."""
    variants = {"vanilla": EVIL, "gated": f"{EVIL}2"}
    table = toy.scores(4, keys=[f"{EVIL}{i}" for i in range(4)])
    table = table[table["variant"].isin(list(variants))].replace({"variant": variants})
    table = table.rename(columns={"saco": EVIL})
    metrics, directions = ["srg", EVIL], {EVIL: True}
    images = [
        replace(
            one,
            label=EVIL,
            predicted=EVIL,
            explained=EVIL,
            group=EVIL,
            path=EVIL,
            maps={variants[v]: one.maps[v] for v in variants},
        )
        for one in toy.images([f"{EVIL}{i}" for i in range(4)], explained=1)
    ]
    features = toy.features(images, np.random.default_rng(0), (EVIL,))
    layers, combinations, sweep = (t.replace({"saco": EVIL, "combined": EVIL}) for t in toy.validation())
    return Contents(
        title=EVIL,
        subtitle=EVIL,
        claims=[Claim(EVIL, True, [Condition(EVIL, holds, EVIL) for holds in (True, False, None)])],
        scores=table,
        metrics=metrics,
        titles={EVIL: EVIL},
        higher_is_better=directions,
        variants=[Variant(name, toy.ROLES[of], EVIL) for of, name in variants.items()],
        summary=summarize(table, EVIL, metrics=metrics),
        paired={EVIL: paired(table, EVIL, metrics=metrics, higher_is_better=directions)},
        layers=layers,
        combinations=combinations.replace({"4 6": EVIL}),
        sweep=sweep,
        curves=toy.curves().replace({"vanilla": EVIL, "fill": EVIL}),
        images=images,
        features=features,
        evidence_of=EVIL,
        ablations=toy.ablations(images, np.random.default_rng(0)),
        settings={EVIL: EVIL},
        versions={EVIL: EVIL},
        command=EVIL,
        notes=[EVIL],
        errors=pd.DataFrame([{EVIL: EVIL}]),
    )


def test_names_are_escaped(tmp_path, undrawn):
    text = write_report(tmp_path / "out", hostile()).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    page = Page(text)
    assert not page.open
    assert [given for tag, given in page.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert not any(name.startswith("on") for _, given in page.tags for name in given)
    assert page.data["images"][0]["key"] == f"{EVIL}0"
    assert page.texts.count(EVIL) > 10
    assert all(path.parent.name in ("out", "figures", "tables") for path in (tmp_path / "out").rglob("*.*"))


def test_only_the_pages_own_script_may_run(full):
    _, folder, _ = full
    text = (folder / "report.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    links = re.findall(r'(?:src|href|srcset)="([^"]{1,40})', text)
    assert all(link.startswith(("#", "data:image/")) for link in links)


def test_files_beside_the_page(full):
    contents, folder, _ = full
    table = pd.read_parquet(folder / "tables/scores.parquet")
    pd.testing.assert_frame_equal(table, contents.scores)
    assert len(pd.read_csv(folder / "tables/paired-vanilla.csv")) == len(contents.paired["vanilla"])
    names = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert names == {path.stem for path in (folder / "figures").glob("*.png")} - {"images"}
    assert {"layers-srg", "sweep-saco", "curves-fill-MIF", "shuffled-srg", "ablation-gate"} <= names
    assert (folder / "figures/images.png").exists()


def test_charts_are_drawn_light_and_dark():
    """One chart of each part, with names that would be mathematics or mark-up."""
    for names in (Names(toy.full(4, grid=2)), Names(hostile())):
        for _, make in CHARTS.values():
            for chart in list(make(names))[:1]:
                light = render(chart, LIGHT, "svg")
                root = ElementTree.fromstring(light)
                assert root.tag.endswith("svg")
                dark = darkened(light)
                ElementTree.fromstring(dark)
                assert LIGHT.paper.encode() in light
                assert LIGHT.paper.encode() not in dark
                assert DARK.paper.encode() in dark


def test_themes_can_replace_each_other():
    pairs = set(zip((*LIGHT[:5], *LIGHT.lines), (*DARK[:5], *DARK.lines), strict=True))
    assert len({light for light, _ in pairs}) == len(pairs)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_contrast(theme):
    """WCAG 2: 4.5 for text, 3 for graphics."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(colour):
        one, two = sorted((luminance(colour), luminance(theme.paper)))
        return (two + 0.05) / (one + 0.05)

    assert contrast(theme.ink) > 7
    assert contrast(theme.soft) > 4.5
    assert min(map(contrast, theme.lines)) > 3


def test_the_same_contents_give_the_same_page(tmp_path, undrawn):
    contents = toy.full(3, grid=2)
    one, two = (write_report(tmp_path / name, contents).read_bytes() for name in "ab")
    assert one == two
    (chart, *_) = layer_charts(Names(contents))
    assert render(chart, LIGHT, "svg") == render(chart, LIGHT, "svg")


def test_three_hundred_images_fit_into_twenty_megabytes(tmp_path, undrawn):
    """With the evidence of 24 images at three blocks, 240 features, and pictures that compress badly."""
    random, grid = np.random.default_rng(0), (16, 16)
    keys = [f"image-{i}" for i in range(300)]
    noise = random.integers(0, 60, (224, 224, 3))
    pictures = [
        np.clip(toy.picture(224, random).astype(int) + np.roll(noise, i, 0), 0, 255).astype(np.uint8) for i in range(12)
    ]
    shape = {f"variant {v}": grid for v in range(10)}
    scores = pd.DataFrame([(k, v, random.random()) for k in keys for v in shape], columns=["image", "variant", "srg"])
    images = [
        ImageEntry(
            key,
            np.roll(pictures[i % 12], i, 1),
            {v: random.random(grid) for v in shape},
            evidence={b: toy.evidence(256, 8, random) for b in (4, 6, 8)} if i < 24 else {},
        )
        for i, key in enumerate(keys)
    ]
    crop = toy.features(images[:1], random)[4, int(images[0].evidence[4].features[0, 0])].crops[0]
    crop = replace(crop, picture=pictures[0][:70, :70])
    one = FeatureEvidence(0.1, 1000, 10, random.integers(0, 9, 24), np.linspace(0, 1, 25), {"a": 1.0}, [crop] * 5)
    contents = Contents("t", [Claim("s", None)], scores, images=images, features={(4, k): one for k in range(240)})
    assert write_report(tmp_path, contents).stat().st_size < 20e6


@pytest.mark.parametrize(("text", "name"), [("a/../b c", "a-..-b-c"), ("../..", "unnamed"), ("x" * 200, "x" * 80)])
def test_names_of_files(text, name):
    assert file_name(text) == name


def test_text_of_values():
    assert [shown(v) for v in (None, float("nan"), 0.5, 12, "a", True, np.float64(1 / 3))] == [
        "",
        "",
        "0.5",
        "12",
        "a",
        "yes",
        "0.3333",
    ]


def test_images_are_called_as_their_files(tmp_path, undrawn):
    from fastfg.report.embedded import gallery

    contents = toy.full(4)
    paths = ["photos/<i><b>&\"'.png", "a/same.png", "b/same.png", None]
    images = [replace(one, path=path) for one, path in zip(contents.images, paths, strict=True)]
    errors = pd.DataFrame([{"path": "far/away/x.png", "key": "0f3e", "error": "not an image"}])
    contents = replace(contents, images=images, errors=errors)
    names = Names(contents)
    said = [one["name"] for one in gallery(names)["images"]]
    assert said == [paths[0].split("/")[-1], "same.png", "same.png", "image-003"]
    assert names.image("image-001") == "same.png (key image-001)"
    assert names.image("unknown") == "unknown"
    text = write_report(tmp_path, contents).read_text(encoding="utf-8")
    assert "<b>&" not in text
    page = Page(text)
    assert page.tables["Errors"] == [
        ["file", "error", "path", "key"],
        ["x.png", "not an image", "far/away/x.png", "0f3e"],
    ]
    numbers = page.tables["Change of the gate of the patch without a feature"]
    assert {row[0] for row in numbers[1:]} == {said[0], "same.png (key image-001)"}
