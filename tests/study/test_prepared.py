"""A study's folder belongs to the settings that something in it was made with, and to none before that."""

import json

import pandas as pd
import pytest

from fastfg.study.config import read_config
from fastfg.study.prepared import Once, check_prepared, check_saes
from fastfg.study.protocol import CHOICE, RULES, record_choice, record_rule
from fastfg.study.selection import Choice
from fastfg.types import Gate
from tests.study.studies import TOML

TRAINED = (
    TOML[: TOML.index("[saes.folders]")] + "[saes.train]\nk = 8\nbatch_tokens = 64\n" + TOML[TOML.index("[protocol]") :]
)


def silent(_):
    pass


@pytest.fixture
def check(tmp_path):
    """Checks the study of ``TRAINED``, with texts of it replaced, in one folder."""
    (tmp_path / "w.safetensors").write_bytes(b"one")
    (tmp_path / "v.safetensors").write_bytes(b"other")

    def checked(*replaced, labels="ab"):
        text = TRAINED
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "study.toml").write_text(text)
        config = read_config(tmp_path / "study.toml")
        images = pd.DataFrame({"key": list("pq"), "label": list(labels), "group": ""})
        check_prepared(config, images, images, Once(config.run.out, silent))
        return json.loads((config.run.out / "prepared.json").read_text())

    return checked


def make(tmp_path, *files):
    for file in files:
        (tmp_path / "out" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / file).touch()


def test_a_mistake_is_corrected_while_nothing_is_made(check, tmp_path):
    check(("vit_tiny", "vit_tinny"), ("k = 8", "k = 800"), ("w.safe", "v.safe"))
    make(tmp_path, "model/.features.1.tmp", "tokens/1/.lock", "saes/trained/layer_1/.lock", "scores/shards/.lock")
    found = check()
    assert found["model.name"] == "vit_tiny_patch16_224"
    assert found["saes.train.k"] == 8
    assert check() == found


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("model/features-training-000000.safetensors", "vit_tiny", "vit_small", "model.name: .* which the head in"),
        ("model/accuracy.json", "img_size = 64", "img_size = 32", "model.img_size: expected 64, which the head in"),
        ("tokens/1/tokens.json", 'out = "out"', 'out = "out"\nseed = 1', "run.seed: expected 0, which the tokens in"),
        (
            "tokens/1/tokens.json",
            "k = 8",
            "k = 8\ntokens_per_image = 2",
            "train.tokens_per_image: .* the tokens in .*got 2",
        ),
        (
            "saes/trained/layer_1/checkpoint.safetensors",
            "k = 8",
            "k = 9",
            "train.k: expected 8, which the SAEs in .*got 9",
        ),
        ("scores/shards/test-0.parquet", "w.safe", "v.safe", "model.weights: expected .* which the scores in"),
    ],
)
def test_what_is_made_with_a_setting_keeps_it(check, tmp_path, file, old, new, message):
    before = check()
    make(tmp_path, file)
    with pytest.raises(ValueError, match=message):
        check((old, new))
    assert check() == before


def test_a_damaged_record_is_named(check, tmp_path):
    check()
    (tmp_path / "out/prepared.json").write_text("")
    with pytest.raises(ValueError, match=r"out/prepared\.json: expected JSON, got a damaged file"):
        check()
    config = read_config(tmp_path / "study.toml")
    for file in (RULES, CHOICE):
        (tmp_path / "out" / file).write_text("{")
    with pytest.raises(ValueError, match=r"out/rules\.json: expected JSON, got a damaged file"):
        record_rule(config, False, "")
    with pytest.raises(ValueError, match=r"out/choice\.json: expected JSON, got a damaged file"):
        record_choice(config.run.out, Choice(Gate((1,)), 0.0, 0.0, 1))


def test_a_record_with_wrong_fields_is_named_and_kept(check, tmp_path):
    check()
    make(tmp_path, "model/accuracy.json")
    config = read_config(tmp_path / "study.toml")
    record = tmp_path / "out/prepared.json"
    record.write_text("[]")
    with pytest.raises(ValueError, match=r"out/prepared\.json: expected a JSON object, got \[\]"):
        check(("k = 8", "k = 9"))
    assert record.read_text() == "[]"
    for text in ("{}", "[{}]", "[]"):
        (tmp_path / "out" / RULES).write_text(text)
        with pytest.raises(ValueError, match=r"out/rules\.json: expected "):
            record_rule(config, False, "")
        (tmp_path / "out" / CHOICE).write_text(text)
        with pytest.raises(ValueError, match=r"out/choice\.json: expected "):
            record_choice(config.run.out, Choice(Gate((1,)), 0.0, 0.0, 1))


def test_saes_that_scores_were_made_with_are_not_exchanged(tmp_path):
    once = Once(tmp_path / "out", silent)
    check_saes(tmp_path / "out", {"trained": {1: "a"}}, once)
    check_saes(tmp_path / "out", {"trained": {1: "b"}, "random": {1: "c"}}, once)  # no scores yet
    make(tmp_path, "scores/shards/test-0.parquet")
    check_saes(tmp_path / "out", {"trained": {1: "b", 2: "d"}}, once)  # one more
    with pytest.raises(ValueError, match="^saes: expected the SAEs that the scores in .* got another one for random, "):
        check_saes(tmp_path / "out", {"trained": {1: "b"}, "random": {1: "e"}}, once)
    check_saes(tmp_path / "out", {"trained": {1: "b", 2: "d"}, "random": {1: "c"}}, once)


def test_other_images_are_said_in_words(check, tmp_path):
    check()
    make(tmp_path, "saes/trained/layer_1/report.json")
    with pytest.raises(ValueError, match=r"^data\.manifest: expected the training images, .*SAEs in .*, got others"):
        check(labels="ba")
    config = read_config(tmp_path / "study.toml")
    images = pd.DataFrame({"key": list("pq"), "label": list("ab"), "group": ""})
    once = Once(config.run.out, silent)
    check_prepared(config, images, images[:1], once)  # no head yet
    make(tmp_path, "model/accuracy.json")
    with pytest.raises(ValueError, match=r"^data\.validation: expected the validation images, .*head in .* others"):
        check_prepared(config, images, images, once)


def test_prompts_are_named(tmp_path):
    start = TRAINED.replace("vit_tiny_patch16_224", "open_clip:x").replace("img_size = 64\n", "")
    images = pd.DataFrame({"key": list("pq"), "label": list("ab"), "group": ""})
    (tmp_path / "w.safetensors").touch()

    def checked(text):
        (tmp_path / "study.toml").write_text(start.replace("probe = true", text))
        config = read_config(tmp_path / "study.toml")
        check_prepared(config, images, images, Once(config.run.out, silent))

    checked('classes = ["a", "b"]')
    make(tmp_path, "tokens/1/complete", "saes/trained/layer_1/report.json")
    checked('classes = ["good", "bad"]')  # the image tower does not depend on them
    make(tmp_path, "scores/shards/test-0.parquet")
    with pytest.raises(ValueError, match=r"^model\.classes: expected \['good', 'bad'\], which the scores in .*'good'"):
        checked('classes = ["bad", "good"]')
    with pytest.raises(ValueError, match=r"^model\.templates: expected \['a photo of a {}\.'\], which .*\['an X-ray"):
        checked('classes = ["good", "bad"]\ntemplates = ["an X-ray of {}."]')


def test_what_does_not_depend_on_a_setting_leaves_it_free(check, tmp_path):
    check(("k = 8", "k = 800"))
    make(tmp_path, "model/accuracy.json", "tokens/1/tokens.json", "tokens/1/complete")
    assert check()["saes.train.k"] == 8
    make(tmp_path, "saes/trained/layer_1/report.json")
    with pytest.raises(ValueError, match=r"seed: expected 0, which the head, the tokens and the SAEs in .* were made"):
        check(("unit = 4", "unit = 4\nseed = 1"))
