"""``fastfg.attribute`` as a whole: C gates (0: vanilla TransMM) on three blocks of a ViT-B with random weights."""

import functools

import torch
import torch.nn.functional as F

import fastfg
from bench.eager import TARGET, authors_way, kept_maps, own
from bench.suite import DTYPES, Case, Provider, Suite, Work, direct
from fastfg.models.timm import import_timm
from fastfg.ops.dispatch import BACKENDS

LAYERS = (2, 3, 4)
IMAGES = 1  # compared with the reference
SWEEP = [(kappa, c) for kappa in (1, 0.5, 0.25) for c in (50, 40, 30, 20, 10, 5, 2, 80, 100)]


def arguments(case, device):
    torch.manual_seed(0)
    side = case.patch * case.grid
    options = {"patch_size": case.patch, "img_size": side, "embed_dim": case.d, "num_heads": case.d // 64}
    model = import_timm().create_model("vit_base_patch16_224", num_classes=10, **options)
    model = model.to(device, DTYPES[case.dtype]).eval().requires_grad_(False)
    images = case.generator(device)(case.B, 3, side, side)
    if not case.C:
        return model, images, {}, [None]
    saes = {layer: random_sae(case, device, layer) for layer in LAYERS}
    if "L0" in case.shape:
        calibrate(model, images, saes, case.L0)
    return model, images, saes, [fastfg.Gate(LAYERS, *config) for config in SWEEP[: case.C]]


def random_sae(case, device, seed):
    random = torch.Generator(device).manual_seed(seed)
    W = F.normalize(torch.randn(case.F, case.d, generator=random, device=device), dim=1).to(DTYPES[case.dtype])
    kind = {"k": case.K} if "K" in case.shape else {"activation": "relu"}
    return fastfg.SparseAutoencoder(
        W.T.contiguous(), W.new_zeros(case.F), W, W.new_zeros(case.d), normalize="layer_norm", **kind
    )


def calibrate(model, images, saes, L0):
    """Set the biases so that ``L0`` features per token are active on average."""
    tokens = fastfg.residuals(model, images[:1], layers=LAYERS)
    for layer, sae in saes.items():
        x = tokens[layer].flatten(0, -2)
        wanted = max(1, round(L0 * len(x)))
        sae.b_enc.fill_(-float(sae.encode(x).flatten().topk(wanted).values[-1]))
        active = float((sae.encode(x) > 0).sum(-1).double().mean())
        assert abs(active / L0 - 1) < 0.1, f"expected about {L0} active features per token, got {active}"


def attribute(model, images, saes, gates, backend="auto"):
    found = fastfg.attribute(model, images, saes=saes or None, gate=gates, target=TARGET, backend=backend)
    return found.maps.flatten(2)  # [C, B, P]


def exact(model, images, saes, gates):
    return attribute(model, images, saes, gates, backend="reference")


def beside(case, arguments):
    """Compare several gates with the first one, and one gate or none with the model's own forward and backward."""
    model, images, saes, gates = arguments
    if len(gates) > 1:
        return "1 gate", functools.partial(attribute, model, images, saes, gates[:1])
    return "own forward + backward", functools.partial(own, model, images)


def work(case: Case) -> Work:
    """Operations: the matrix products of forward, activation backward and three encoders. Bytes: each weight once."""
    P, N, d = case.grid**2, case.grid**2 + 1, case.d
    blocks = 12 * (24 * N * d**2 + 4 * N**2 * d)
    embedding = 2 * P * 3 * case.patch**2 * d
    F_ = len(LAYERS) * case.F if case.C else 0
    weights = 12 * 12 * d**2 * 2 + 2 * d * F_
    return Work(bytes=weights * case.element, flops=case.B * (2 * blocks + embedding + 2 * P * d * F_))


def fastfg_providers():
    return {name: Provider(direct(attribute, backend=name), backend=name) for name in BACKENDS}


def one_at_a_time(case, device):
    if case.C > 1:
        return f"it handles one gate at a time, and the case has {case.C}"
    return f"it handles one image at a time: {case.B} images take {case.B} times as long" if case.B > 8 else None


VIT_B16 = {"patch": 16, "grid": 14, "d": 768}
VIT_B32 = {"patch": 32, "grid": 7, "d": 768}
TOPK, RELU = {"F": 49152, "K": 128}, {"F": 49152, "L0": 1500}
SUITE = Suite(
    name="attribute",
    small=[
        Case({"C": 0, "B": 2, **VIT_B16}),
        Case({"C": 1, "B": 1, **VIT_B16, **TOPK}),
        Case({"C": 27, "B": 1, **VIT_B32, **TOPK}),
    ],
    full=[
        *(Case({"C": 1, "B": B, **VIT_B16, **TOPK}, "bfloat16") for B in (1, 8, 64, 256)),
        *(Case({"C": C, "B": 64, **VIT_B16, **(TOPK if C else {})}, "bfloat16") for C in (0, 27)),
        Case({"C": 1, "B": 64, **VIT_B16, **RELU}, "bfloat16"),
        Case({"C": 1, "B": 64, **VIT_B32, **TOPK}, "bfloat16"),
        Case({"C": 1, "B": 8, **VIT_B16, **TOPK}),
    ],
    providers={
        **fastfg_providers(),
        "eager, kept maps": Provider(direct(kept_maps), bar="whole"),
        "the author's way": Provider(direct(authors_way), bar="whole", why_not=one_at_a_time),
        "own forward + backward": Provider(lambda model, images, *_: functools.partial(own, model, images), bar="part"),
    },
    arguments=arguments,
    part=lambda arguments: (arguments[0], arguments[1][:IMAGES], *arguments[2:]),
    pick=lambda result, arguments: (result[:, :IMAGES],),
    exact=exact,
    work=work,
    tolerance=1e-3,
    beside=beside,
)


def test_attribute(bench, case, provider):
    bench(SUITE, case, provider)
