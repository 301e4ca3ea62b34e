"""Make attribution maps: one forward pass and one backward pass, for any number of gates.

The step ``r <- r + (r @ E_l) * w_l`` runs from the last block to the first. The backward pass visits the blocks in the
same order, so the maps are finished when the backward pass is. No attention map is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastfg.attribution.blurred import blurred
from fastfg.attribution.capture import Capture, named_errors
from fastfg.attribution.choose_methods import Chosen, Explained, choose_methods, explain
from fastfg.attribution.gradient_scale import Exponents, scale_of
from fastfg.attribution.methods import OtherMethods, gradient_x_input
from fastfg.attribution.relevancy_pass import RelevancyPass
from fastfg.attribution.sae_report import on_blank_images
from fastfg.checks import check_gates, check_images, check_saes, check_seed, check_target, check_widths
from fastfg.models import Adapter, adapt
from fastfg.models.first_rows import FirstRows, first_rows
from fastfg.models.hold import hold
from fastfg.perturb.masks import PatchGrid
from fastfg.reference.relevancy import IDENTITIES
from fastfg.sae.model import SparseAutoencoder
from fastfg.targets import Function, Target, TargetLike, as_given, as_target, map_tensors
from fastfg.torch_internals import buffers_of, parameters_of
from fastfg.types import Attribution, Features, Gate, Methods

SAEs = Mapping[int, SparseAutoencoder]


def attribute(
    model: nn.Module | Adapter,
    images: Tensor,
    *,
    saes: SAEs | Sequence[SAEs | None] | None = None,
    gate: Gate | Sequence[Gate | None] | None = None,
    target: TargetLike = None,
    identity: str = "transmm",
    backend: str = "auto",
    features: int = 0,
    methods: Methods = (),
    seed: int = 0,
    keys: Sequence[str | int] | None = None,
    **options: Mapping[str, Any] | None,
) -> Attribution:
    """Explain ``images`` by Feature-Gradient Attribution (Šula), or by TransMM (Chefer et al.) without a gate.

    Args:
        model: a Vision Transformer of a known family (see :mod:`fastfg.models`). It is left unchanged.
        images: [B, C, H, W], preprocessed as the model expects, in the model's dtype and on its device.
        saes: {block: SparseAutoencoder}, one per gated block; none is needed for ``gradient_x_residual``. Or a list of
            such mappings (or None), one per gate of a list, to compare SAEs with each other.
        gate: a :class:`Gate`, None for vanilla TransMM, or a list of both. A list also takes one forward and one
            backward pass.
        target: the class to explain: None (the predicted one), an int, or one per image. A single logit ``z`` is read
            as a sigmoid: class 1 explains ``z``, class 0 explains ``-z``. Or a :class:`fastfg.Target`, for a
            difference of two classes or a similarity. Or a differentiable function that maps the model's own output
            to one value per image [B], as in ``lambda outputs: outputs.logits[:, 3]``.
        identity: ``transmm`` (default) has no identity inside ``E``; ``paper`` follows eq. 1 literally.
        backend: ``auto``, or the backend that must serve every op (see ``fastfg info``).
        features: how many of the strongest feature contributions to return per patch and gated block.
        methods: other explanations to return with the maps, names of ``fastfg.types.METHODS``, or {name: method}. A
            method is one of those names, a tensor [B, gh, gw], or a callable ``(images, target) -> maps`` for maps
            from elsewhere; ``target`` is the explained class per image [B], or the target that was given.

            - Without the model: ``random`` (uniform), ``centre`` (a Gaussian in the middle of the grid with a standard
              deviation of ``width``, 0.25, of its sides), ``edges`` (the mean magnitude of the luminance's Sobel
              gradient).
            - From the pass: ``rollout`` (attention rollout), ``last_attention`` (the raw attention of the last block,
              or of the pooling head, averaged over heads), ``grad_cam`` (on the tokens of the last block whose patches
              the target depends on, or of ``layer``), and ``gradient_x_input`` (summed over each patch; the backward
              pass then goes down to the pixels).
            - With passes of its own: ``integrated_gradients`` (``steps``, 50; from ``baseline``, ``"zero"``; summed
              over each patch).
        seed, keys: what ``random`` depends on: the seed and the image's key (None: a hash of its pixels), and the
            method's name.
        options: {method: its arguments}, as in ``integrated_gradients={"steps": 100}``.

    Returns an :class:`Attribution`. Raises ValueError or TypeError that names the argument, and RuntimeError where
    the model does not run each block once, in order, with one attention over all tokens.

    >>> import torch, timm, fastfg
    >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    >>> fastfg.attribute(model, torch.randn(2, 3, 32, 32)).maps.shape
    torch.Size([2, 2, 2])
    """
    adapter = adapt(model)
    explained = check_target(adapter, as_target(target))
    chosen = choose_methods(methods, options)
    check_seed(seed)
    configs = list(gate) if isinstance(gate, Sequence) else [gate]
    saes_of_gates = _per_gate(saes, gate)
    _check(adapter, images, saes, configs, identity, features)
    single = not isinstance(gate, Sequence)
    if len(images) == 0:
        same = {"saes": saes, "identity": identity, "backend": backend, "features": features, "gate": gate}
        return _of_no_images(adapter, images, target, single, chosen, **same)
    grid = PatchGrid.of((images.shape[-2], images.shape[-1]), adapter.patches(images), adapter.patch_size)
    n_tokens = adapter.num_prefix_tokens + grid.n_patches

    def check(block: int, x: Tensor) -> None:
        check_widths(saes, configs, features, x, block)

    carried = (_with_vanilla(configs), saes_of_gates, identity, backend, features)
    to_pixels = "gradient_x_input" in chosen.built_in
    exponents = Exponents(len(images), images.device)
    while True:
        relevancy = RelevancyPass(adapter, n_tokens, *carried)
        others = OtherMethods(adapter, n_tokens, chosen.built_in, chosen.options.get("grad_cam", {}).get("layer"))
        with hold(adapter.model, adapter.flags), torch.inference_mode(False), torch.enable_grad():
            passed = _pass(images.detach(), explained, relevancy, others, check, to_pixels, exponents)
        if not passed.scaled or not exponents.lower(relevancy.overflowed(passed.is_nan)):
            break
    relevancy.mark_missing(passed.is_nan)

    found = others.maps((grid.gh, grid.gw))
    if passed.gradient is not None:
        found["gradient_x_input"] = gradient_x_input(images.detach(), passed.gradient, grid)
    named = as_given(target, passed.target)
    found = explain(chosen, found, Explained(adapter, images, grid, passed.target, named, seed, keys))
    return _result(relevancy, configs, grid, named, map_tensors(passed.output, Tensor.detach), found, single)


class _Passed(NamedTuple):
    """What is left of one forward and one backward pass.

    Attributes:
        target: resolved. output: the logits, or the model's output for a target function.
        gradient: at the pixels [B, C, H, W], if it was asked for. scaled: whether gradients were kept in range.
        is_nan: [B], whether an image's target is undefined: its value or a logit is NaN.
    """

    target: Target
    output: Any
    gradient: Tensor | None
    scaled: bool
    is_nan: Tensor


def _pass(
    images: Tensor,
    target: Target,
    relevancy: RelevancyPass,
    others: OtherMethods,
    check: Callable[[int, Tensor], None],
    to_pixels: bool,
    exponents: Exponents,
) -> _Passed:
    """One forward and one backward pass: they fill ``relevancy`` and ``others``.

    Args:
        check: called with a block and its residual stream. to_pixels: whether the backward pass ends at the images.
        exponents: of a float16 model, see :mod:`fastfg.attribution.gradient_scale`.
    """
    adapter, layers = relevancy.adapter, {*relevancy.layers, *others.layers}

    def on_residual(block: int, x: Tensor, g: Tensor) -> None:
        check(block, x)
        relevancy.on_residual(block, x, g)
        others.on_residual(block, x, g)

    root = images.clone().requires_grad_() if to_pixels else None
    on_attention = [relevancy.on_attention, others.on_attention]
    captured = (adapter, (len(images), relevancy.n_tokens), layers, on_residual, on_attention, root)
    rows = None if isinstance(target, Function) else first_rows(adapter, relevancy.n_tokens, layers)
    try:
        capture, resolved, y, seen, output = _forward(Capture(*captured), images, target, rows)
    except Exception:
        if rows is None or not rows.in_doubt:
            raise
        capture, resolved, y, seen, output = _forward(Capture(*captured), images, target, None)
        rows.give_up()
    with named_errors(capture.name):
        scale = scale_of(y, resolved, output, exponents) if capture.in_float16 else None
        gradient = capture.backward(y, scale)
    is_nan = y.detach().isnan()
    if not isinstance(resolved, Function):
        is_nan |= seen.isnan().any(1)
    return _Passed(resolved, seen, None if root is None else gradient, scale is not None, is_nan)


def _forward(
    capture: Capture, images: Tensor, target: Target, rows: FirstRows | None
) -> tuple[Capture, Target, Tensor, Any, Any]:
    """The captured forward pass, the resolved target, its value per image [B], the logits, and the model's output.

    For a target function, the output stands in place of the logits.
    """
    B, adapter = len(images), capture.adapter
    given = images if capture.root is None else capture.root
    with rows or nullcontext():
        with named_errors(capture.name), capture:
            output = adapter.forward(given.clone())  # it may write into them
        last = capture.take_last()
        if isinstance(target, Function):
            value = target.value(output, B)
            capture.check_images_apart(value, last)
            return capture, target, value, output, output
        logits = target.source(output, B)
        resolved = target.of(logits.detach())
        value = resolved.value(output, B)

    def in_full() -> Tensor:
        with torch.no_grad():
            return target.source(adapter.forward(images.clone()), B)

    if rows is not None:
        rows.check(logits, in_full)
    return capture, resolved, value, logits, output


def _per_gate(saes: Any, gate: Any) -> list[Any]:
    """The SAEs of each gate. What is neither a list nor a tuple is for all of them."""
    single = not isinstance(gate, Sequence)
    n = 1 if single else len(gate)
    if not isinstance(saes, (list, tuple)):
        return [saes] * n
    if single or len(saes) != n:
        got = f"a list of {len(saes)} for one gate" if single else f"{len(saes)} for {n} gate{'s' * (n != 1)}"
        raise ValueError(f"saes: expected {{block: SparseAutoencoder}}, or one such mapping for each gate, got {got}")
    return list(saes)


def _with_vanilla(configs: list[Gate | None]) -> list[Gate | None]:
    """``configs``, with vanilla at the end if a blurred gate needs it and it is not among them."""
    needed = None not in configs and any(config is not None and config.blurred for config in configs)
    return [*configs, None] if needed else configs


def _result(
    relevancy: RelevancyPass,
    configs: Sequence[Gate | None],
    grid: PatchGrid,
    target: Any,
    logits: Any,
    methods: dict[str, Tensor],
    single: bool,
) -> Attribution:
    """The results as an :class:`Attribution`. With ``single``, the leading dimension of configurations is dropped."""
    assert relevancy.rows is not None  # Capture.backward reached every block
    maps = relevancy.rows[..., -grid.n_patches :].unflatten(-1, (grid.gh, grid.gw)).contiguous()
    vanilla = maps[relevancy.configs.index(None)] if None in relevancy.configs else None
    for c, config in enumerate(configs):
        if config is not None and config.blurred:
            assert vanilla is not None  # _with_vanilla
            maps[c] = blurred(vanilla, maps[c])

    def pick(t: Tensor) -> Tensor:
        return t[0] if single else t[: len(configs)]

    return Attribution(
        maps=pick(maps).contiguous(),
        target=target,
        logits=logits,
        scores={block: pick(t) for block, t in sorted(relevancy.scores.items())},
        gates={block: pick(t) for block, t in sorted(relevancy.gates.items())},
        features={block: Features(*map(pick, t)) for block, t in sorted(relevancy.features.items())},
        methods=methods,
    )


def _of_no_images(
    adapter: Adapter, images: Tensor, target: TargetLike, single: bool, chosen: Chosen, **options: Any
) -> Attribution:
    """Empty results, cut from the result for one blank image, because many models can't run an empty batch."""
    explained = as_target(target).bound(adapter.logits)
    with on_blank_images():
        one = attribute(adapter, images.new_zeros(1, *images.shape[1:]), target=explained.for_one_image(), **options)

    def cut(t: Tensor) -> Tensor:
        return t[:0] if single else t[:, :0]

    return Attribution(
        maps=cut(one.maps),
        target=as_given(target, explained.of(one.logits[:0]) if explained.needs_logits else explained),
        logits=map_tensors(one.logits, lambda t: t[:0]),
        scores={block: cut(t) for block, t in one.scores.items()},
        gates={block: cut(t) for block, t in one.gates.items()},
        features={block: Features(*map(cut, t)) for block, t in one.features.items()},
        methods={name: one.maps.new_empty(0, *one.maps.shape[-2:]) for name in chosen.by_name},
    )


def _check(
    adapter: Adapter,
    images: Tensor,
    saes: Any,
    configs: list[Gate | None],
    identity: str,
    features: int,
) -> None:
    parameter = adapter.parameter
    check_images(images, adapter.in_chans, parameter)
    _check_weights(adapter.model)
    if not configs:
        raise ValueError("gate: expected a Gate, None or a list with at least one of them, got an empty list")
    check_gates(configs, adapter)
    if isinstance(features, bool) or not isinstance(features, int) or features < 0:
        raise ValueError(f"features: expected a number >= 0, got {features!r}")
    need = [c.layers if c is not None and (c.needs_sae or features) else () for c in configs]
    if isinstance(saes, (list, tuple)):
        for i, (own, layers) in enumerate(zip(saes, need, strict=True)):
            check_saes(own, layers, parameter.device, f"saes[{i}]")
    else:
        check_saes(saes, sorted(set(chain(*need))), parameter.device)
    if identity not in IDENTITIES:
        raise ValueError(f"identity: expected one of {IDENTITIES}, got {identity!r}")


def _check_weights(model: nn.Module) -> None:
    """Refuse weights that were created under ``torch.inference_mode``: autograd can't use them."""
    modules = list(model.modules())
    for weight in chain(parameters_of(modules), buffers_of(modules)):
        if weight.is_inference() and weight.is_floating_point():
            every = chain(model.named_parameters(), model.named_buffers())
            name = next(name for name, other in every if other is weight)
            raise ValueError(
                f"model: expected weights that gradients can flow through, got {name} made under "
                "torch.inference_mode(): build and load the model outside of it"
            )
