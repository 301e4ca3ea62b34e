"""``encode_project``: codes and scores in one op, for SAEs of any sparsity."""

from __future__ import annotations

from torch import Tensor

from fastfg import reference
from fastfg.ops.check import check_shapes
from fastfg.ops.dispatch import choose, detached, only_reference, register, torch_op

NEEDED = {"jumprelu": ("threshold",), "batch_topk": ("threshold",), "gated": ("r_mag", "b_gate", "b_mag")}


@register
def _encode_project(
    x: Tensor,
    g: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    activation: str,
    threshold: Tensor | None,
    r_mag: Tensor | None,
    b_gate: Tensor | None,
    b_mag: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0])


@detached
def encode_project(
    x: Tensor,
    g: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    activation: reference.Activation,
    *,
    backend: str = "auto",
) -> Tensor:
    """Scores ``s_t = sum_f f_t,f (W_dec[f] . g_t)`` of an SAE that is not TopK. No array [T, F] is stored.

    Args:
        x: [T, d] residual stream, already normalised, and with ``b_dec`` already subtracted if the SAE subtracts it.
        g: [T, d] gradient of the target at the residual stream.
        W_enc: [d, F] encoder. ``x`` may have another dtype; it is converted to the encoder's.
        b_enc: [F]. Not used by a ``gated`` SAE.
        W_dec: [F, d] decoder, with ``g``'s dtype.
        activation: ``relu``, ``tanh_relu``, ``jumprelu``, ``batch_topk`` or ``gated``, with its parameters.
        backend: ``auto``, ``reference``, ``cpp`` or ``triton``. The reference alone has thresholds that are not strict.

    Returns:
        Scores [T], of ``x``'s dtype.

    Raises:
        ValueError: for shapes that don't fit, a missing parameter, or an activation that needs all features
            at once (``topk``, ``groupmax``).
        BackendError: if the named backend can't run; the message has every reason.

    Source: equations 2 and 3.
    """
    check_shapes({}, W_enc=(W_enc, "d F"), x=(x, "T d"), g=(g, "T d"), b_enc=(b_enc, "F"), W_dec=(W_dec, "F d"))
    _check_parameters(activation, len(b_enc))
    if not activation.strict:
        only_reference("encode_project", backend, "thresholds that are not strict")
        return reference.encode_project(x, g, W_enc, b_enc, W_dec, activation)
    chosen = choose("encode_project", backend, x.device, x.dtype)
    if chosen == "reference":
        return reference.encode_project(x, g, W_enc, b_enc, W_dec, activation)
    a = activation
    parameters = (a.threshold, a.r_mag, a.b_gate, a.b_mag)
    return torch_op("encode_project", chosen)(x, g, W_enc, b_enc, W_dec, a.name, *parameters)


def _check_parameters(activation: reference.Activation, F: int) -> None:
    """Require the parameters of the activation, each [F] or one number for all features."""
    for name in NEEDED.get(activation.name, ()):
        parameter = getattr(activation, name)
        if parameter is None or (parameter.ndim and list(parameter.shape) != [F]):
            got = None if parameter is None else list(parameter.shape)
            raise ValueError(f"{name}: expected [] or [{F}] for {activation.name}, got {got}")
