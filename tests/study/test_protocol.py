"""A small study from beginning to end: its order, what is run again, and that any number of processes get the same."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

from fastfg.attribution.attribute import attribute
from fastfg.data import batches
from fastfg.metrics.evaluate import evaluate
from fastfg.study.claim import GATE, VANILLA
from fastfg.study.config import read_config
from fastfg.study.contents import _notes, judgement
from fastfg.study.cost import estimate
from fastfg.study.judging import COLUMNS, Judging
from fastfg.study.prepare import prepare
from fastfg.study.protocol import measures_of, record_rule, run_protocol
from fastfg.study.store import Store
from tests.study.studies import make_study

pytestmark = pytest.mark.slow


def silent(*_):
    pass


def track(title):
    return silent


def open_study(file):
    config = read_config(file)
    config.run.out.mkdir(exist_ok=True)
    parts = prepare(config, torch.device("cpu"), silent, track)
    return Judging(config, parts, Store(config.run.out / "scores", columns=COLUMNS, say=silent), track)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with a finished study, its judging and its outcome."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("study")
    judging = open_study(make_study(folder))
    outcome = run_protocol(judging, silent)
    judging.store.read().to_pandas().to_parquet(folder / "expected.parquet")
    yield folder, judging, outcome
    torch.set_num_threads(threads)


def test_splits_stay_apart(done):
    _, judging, outcome = done
    images = judging.parts.images
    assert set(images.loc[judging.parts.validation, "split"]) == {"validation"}
    assert set(images.loc[judging.parts.test, "split"]) == {"test"}
    assert set(outcome.sweep["image"]) <= set(judging.parts.validation)
    for table in outcome.tests.values():
        assert set(table["image"]) == set(judging.parts.test)


def test_the_choice_is_written_before_the_first_test_score(done):
    folder, *_ = done
    choice = (folder / "out/choice.json").stat().st_mtime_ns
    written = {file.name: file.stat().st_mtime_ns for file in (folder / "out/scores/shards").glob("*.parquet")}
    assert all(time > choice for name, time in written.items() if name.startswith("test"))
    assert all(time < choice for name, time in written.items() if name.startswith("validation"))
    (rule,) = json.loads((folder / "out/rules.json").read_text())
    assert not rule["scores_existed"]


def test_the_choice_is_the_best_of_the_sweep(done):
    _, _, outcome = done
    means = outcome.sweep.pivot(index="image", columns="variant", values="srg").mean().drop(VANILLA)
    assert outcome.choice.mean == pytest.approx(means.max())
    gate = outcome.choice.gate
    assert f"kappa {gate.kappa:g}, c_max {gate.c_max:g}" in means.idxmax()


def test_scores_are_those_of_attribute_and_evaluate(done):
    _, judging, outcome = done
    unit = judging.units("test")[0]
    rows = judging.parts.images.loc[list(unit.keys)]
    (batch,) = batches([*rows["path"]], judging.parts.transform, len(rows))
    found = attribute(judging.parts.model, batch.images, saes=judging.parts.saes["trained"], gate=outcome.choice.gate)
    for mode, table in outcome.tests.items():
        scores = evaluate(
            judging.parts.model,
            batch.images,
            found.maps,
            target=found.target,
            metrics=["srg", "deletion", "insertion"],
            baseline=mode,
            keys=list(unit.keys),
            **{name: {"patches_per_step": 6} for name in ("srg", "deletion", "insertion")},
        )
        own = table[table["variant"] == GATE].set_index("image").loc[list(unit.keys)]
        for metric in scores:
            assert own[metric].tolist() == pytest.approx(scores[metric].tolist(), abs=1e-6)
        assert (own["srg"] - (own["insertion"] - own["deletion"])).abs().max() < 1e-6


def test_controls_use_their_own_saes(done):
    _, judging, outcome = done
    table = outcome.tests["mean"].pivot(index="image", columns="variant", values="srg")
    names = [VANILLA, GATE, *outcome.controls, *outcome.shuffled]
    assert sorted(table.columns) == sorted(names)
    for one, other in [
        (GATE, "frozen-decoder SAE"),
        (GATE, "random SAE"),
        (GATE, "shuffled 0"),
        ("shuffled 0", "shuffled 1"),
    ]:
        assert not table[one].equals(table[other])
    identities = [judging.identity(variant) for variant in outcome.variants]
    assert len(set(identities)) == len(identities)


def test_nothing_runs_twice_and_only_what_is_new_runs(done):
    folder, *_ = done
    rules = (folder / "out/rules.json").read_text()
    again = open_study(folder / "study.toml")
    run_protocol(again, silent)
    assert again.forwards == 0
    text = (folder / "study.toml").read_text()
    other = folder / "other.toml"
    other.write_text(text.replace("shuffled = 2", 'shuffled = 2\ncontrols = ["random", "rollout"]'))
    more = open_study(other)
    outcome = run_protocol(more, silent)
    n = len(more.parts.test)
    per_map = 2 * (3 - 1)  # 16 patches in steps of 6 are 3 steps, the last of which removes all; both orders
    in_both_modes = 2 * n * (per_map + 2)  # and the image, and the image without any patch
    assert 0 < more.forwards <= in_both_modes
    assert "rollout" in outcome.controls
    assert [rule["scores_existed"] for rule in json.loads((folder / "out/rules.json").read_text())] == [False, True]
    (folder / "out/rules.json").write_text(rules)


def test_a_rule_that_changes_is_recorded(done):
    folder, judging, _ = done
    config = judging.config.model_copy(
        update={"protocol": judging.config.protocol.model_copy(update={"max_layers": 1})}
    )
    before = (folder / "out/rules.json").read_text()
    try:
        record_rule(config, begun=True, images=judging.images_hash)
        rules = json.loads((folder / "out/rules.json").read_text())
        assert [rule["scores_existed"] for rule in rules] == [False, True]
    finally:
        (folder / "out/rules.json").write_text(before)


def test_images_that_change_are_recorded(done):
    folder, judging, _ = done
    before = (folder / "out/rules.json").read_text()
    fewer = dataclasses.replace(judging, parts=dataclasses.replace(judging.parts, test=judging.parts.test[1:]))
    try:
        record_rule(judging.config, True, judging.images_hash)
        assert len(json.loads((folder / "out/rules.json").read_text())) == 1
        record_rule(judging.config, True, fewer.images_hash)
        first, second = json.loads((folder / "out/rules.json").read_text())
        assert first["rule"] == second["rule"]
        assert second["scores_existed"]
        assert "images, or their groups, were changed after scores" in " ".join(_notes(judging))
    finally:
        (folder / "out/rules.json").write_text(before)


def test_a_label_is_an_output_of_the_model(done):
    """Where labels are explained, other names of the outputs ask for other scores."""
    _, judging, _ = done
    model = judging.config.model.model_copy(update={"target": "label"})
    one = dataclasses.replace(judging, config=judging.config.model_copy(update={"model": model}))
    other = dataclasses.replace(one, parts=dataclasses.replace(one.parts, labels=one.parts.labels[::-1]))
    assert [unit.keys for unit in one.units("test")] == [unit.keys for unit in other.units("test")]
    assert not {unit.name for unit in one.units("test")} & {unit.name for unit in other.units("test")}


def test_the_claim_is_made_of_the_test(done):
    _, _, outcome = done
    found, tables = judgement(outcome, 0)
    assert found.strongest in [*outcome.controls, "shuffled (mean of seeds)"]
    assert found.claim.holds == all(condition.holds for condition in found.claim.conditions)
    n = found.claim.effects[0].n
    assert n == tables["mean"].pivot(index="image", columns="variant", values="srg")[[GATE, VANILLA]].dropna().shape[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'weights = "w.safetensors"',
            'weights = "other.safetensors"',
            "model.weights: expected a file, got .*, which does",
        ),
        ("img_size = 64", "img_size = 32", "model.img_size: expected 64, which the head and the scores"),
        ('out = "out"', 'out = "out"\nseed = 1', "run.seed: expected 0"),
        (
            'trained = "saes/trained"',
            'trained = "saes/frozen"',
            "saes: expected the SAEs that the scores .*trained, block 1",
        ),
    ],
)
def test_a_folder_of_another_study_is_refused(done, old, new, message):
    folder, *_ = done
    file = folder / "refused.toml"
    file.write_text((folder / "study.toml").read_text().replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_protocol(open_study(file), silent)


def test_the_same_saes_for_two_kinds_are_refused(done):
    _, judging, outcome = done
    same = {**judging.parts.identities, "trained": judging.parts.identities["frozen-decoder"]}
    own = dataclasses.replace(judging, parts=dataclasses.replace(judging.parts, identities=same))
    with pytest.raises(ValueError, match="frozen-decoder SAE.*expected other maps than 'gate'"):
        own.scores("Test", "test", outcome.variants, [])


def test_the_report_names_classes_that_are_not_trained_on(done):
    _, judging, _ = done
    other = dataclasses.replace(judging.parts, unlearned="Without a class that the model has learned: grey (1 image)")
    assert f"{other.unlearned}." in _notes(dataclasses.replace(judging, parts=other))
    assert "Without a class" not in " ".join(_notes(judging))


def test_an_image_without_a_group_is_one_by_itself(done):
    _, judging, outcome = done
    images = judging.parts.images.copy()
    images["group"] = ["patient"] * (len(images) - 1) + [""]
    parts = dataclasses.replace(judging.parts, images=images)
    own = dataclasses.replace(judging, parts=parts, config=judging.config)
    measures = measures_of(judging.config, judging.patches_per_step)["mean"]
    table = own.table(outcome.rows, outcome.variants[:2], measures)
    alone = images.index[-1]
    assert set(table.loc[table["image"] != alone, "group"]) <= {"patient"}
    assert set(table.loc[table["image"] == alone, "group"]) <= {f"image {alone}"}


def test_the_shuffled_decoders_can_be_the_strongest_control(done):
    _, _, outcome = done
    found, _ = judgement(outcome._replace(controls=[]), 0)
    assert found.strongest == "shuffled (mean of seeds)"
    assert len(found.signs) == 8


def start(file, rank):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "4"}
    command = [sys.executable, "-m", "fastfg", "study", "run", str(file), "--processes", "1"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_killed_processes_leave_the_same_table(done, tmp_path):
    """Three processes are killed with -9; then one goes on. The scores are those of one undisturbed process."""
    folder, *_ = done
    for name in ("m.parquet", "w.safetensors", "saes", "photos"):
        (tmp_path / name).symlink_to(folder / name)
    file = tmp_path / "study.toml"
    file.write_text((folder / "study.toml").read_text())
    shards = tmp_path / "out/scores/shards"
    processes = [start(file, rank) for rank in (1, 2, 3)]
    until = time.monotonic() + 120
    while len(list(shards.glob("*.parquet"))) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = start(file, 0)
    output = last.communicate(timeout=300)[0].decode()
    assert last.returncode == 0, output
    found = Store(tmp_path / "out/scores", columns=COLUMNS, say=silent).read()
    assert found.num_rows > 500
    assert found.to_pandas().equals(pd.read_parquet(folder / "expected.parquet"))


def test_the_cost_is_foreseen(done):
    _, judging, _ = done
    cost = estimate(judging.config, torch.device("cpu"), silent)
    assert cost.memory > 2**26
    foreseen = int(cost.table["forwards"].sum())
    assert judging.forwards <= foreseen <= 2 * judging.forwards  # few patches: variants share masks
    titles = list(cost.table["stage"])
    assert titles[0] == "linear head"
    assert cost.table["images"][0] == 26 - len(judging.parts.test)  # training and validation images
    assert 0 == cost.alone < cost.minutes(2) < cost.minutes()
    assert titles[-2:] == ["test", "test, shuffled decoders"]
    assert (cost.table["minutes"] >= 0).all()
