"""``fastfg.evaluate``: C maps of B photographs, judged by one metric or all three, on a ViT with random weights.

It is compared with a loop over single perturbed images, and with Quantus under the same definitions (patches filled
with 0). Quantus's correlation draws pixels, not patches. The numbers of pixels and forwards are the same, but the
scores differ and are not compared.
"""

import importlib.util
import warnings
from functools import partial

import numpy as np
import torch

import fastfg
from bench.photographs import photographs
from bench.suite import DTYPES, Case, Provider, Suite, Work
from fastfg.metrics.subsets import default_subset_size, draw_subsets
from fastfg.models.timm import import_timm
from fastfg.perturb import generator

METRICS = {"pf": ["pixel_flipping"], "fc": ["faithfulness_correlation"], "all": list(fastfg.metrics.DEFAULT_METRICS)}
READ = {"saco": "impact", "faithfulness_correlation": "drop", "pixel_flipping": "curve"}  # from the readings
RUNS, TRIALS, FILL, TARGET = 20, 3, 0.0, 1


def arguments(case, device):
    torch.manual_seed(0)
    options = {"patch_size": case.patch, "img_size": case.patch * case.grid, "embed_dim": case.d}
    model = import_timm().create_model("vit_base_patch16_224", num_classes=10, num_heads=case.d // 64, **options)
    model = model.to(device, DTYPES[case.dtype]).eval().requires_grad_(False)
    images = photographs(case.B, case.patch * case.grid).to(device, DTYPES[case.dtype])
    gates = [None, *(fastfg.Gate((2, 3, 4), c_max=c, score="gradient_x_residual") for c in range(2, case.C + 1))]
    maps = fastfg.attribute(model, images, gate=gates, target=TARGET).maps
    return model, images, ranks(maps), METRICS[case.metric]


def ranks(maps):
    """The rank of each patch. Only the order counts here, and ranks are the same in any precision."""
    return maps.flatten(2).argsort(-1).argsort(-1).unflatten(2, maps.shape[2:]).to(maps.dtype)


def evaluate(path):
    def make(model, images, maps, metrics):
        return partial(run, path, model, images, maps, metrics)

    return make


def run(path, model, images, maps, metrics):
    """Run in the model's own precision, which is not the default for a float32 model on a CUDA device."""
    options = {"target": TARGET, "metrics": metrics, "baseline": FILL, "path": path, "precision": "float32"}
    scores = fastfg.evaluate(model, images, maps, keys=keys(images), **options)
    return tuple(scores.details[name][READ[name]] for name in scores)


def keys(images):
    """Keys that do not depend on the precision of the pixels."""
    return range(len(images))


@torch.no_grad()
def one_at_a_time(model, images, maps, metrics):
    """Make and run each perturbed image separately; the masks follow the definitions."""
    read = {name: [] for name in metrics}
    for amap in maps:
        for i, image in enumerate(images):
            before, flat = logits_of(model, image), amap[i].flatten().double().cpu()
            order = flat.argsort(descending=True, stable=True)
            if "saco" in read:
                after = [
                    prob(logits_of(model, image, group, amap)) for group in order.tensor_split(-(-len(order) // 4))
                ]
                read["saco"].append(prob(before) - torch.stack(after))
            if "faithfulness_correlation" in read:
                subsets = drawn(i, len(order))
                after = [logits_of(model, image, s, amap)[TARGET] for s in subsets]
                read["faithfulness_correlation"].append((before[TARGET] - torch.stack(after)).reshape(TRIALS, RUNS))
            if "pixel_flipping" in read:
                after = [prob(logits_of(model, image, order[: n + 1], amap)) for n in range(len(order))]
                read["pixel_flipping"].append(torch.stack([prob(before), *after]))
    shape = maps.shape[:2]
    return tuple(torch.stack(rows).unflatten(0, shape).cpu() for rows in read.values())


def logits_of(model, image, patches=(), amap=None):
    """The logits, in float64, of ``image`` with ``patches`` filled."""
    if len(patches):
        image = image.clone()
        size = image.shape[-1] // amap.shape[-1]
        for patch in patches:
            row, column = divmod(int(patch), amap.shape[-1])
            image[:, row * size : (row + 1) * size, column * size : (column + 1) * size] = FILL
    return model(image[None])[0].double()


def prob(logits):
    return logits.softmax(-1)[TARGET]


def drawn(key, P):
    """The subsets that fastfg draws for this key, so that the loop uses the same ones."""
    random = generator(0, str(key), "faithfulness_correlation")
    return draw_subsets(P, TRIALS, RUNS, default_subset_size(P), random).flatten(0, 1)


def quantus(model, images, maps, metrics, whole_patches=False):
    """Quantus's metric on each map. Pixel Flipping returns its curve, the correlation only its score.

    Quantus requires that a step divides the number of pixels of one channel, which is a third of a patch with three
    channels. ``whole_patches`` disables that check, and needs a third of the forwards.
    """
    import quantus as q

    size = images.shape[-1] // maps.shape[-1]
    channels, P = images.shape[1], maps[0, 0].numel()
    whole = maps.repeat_interleave(size, -2).repeat_interleave(size, -1)[:, :, None].expand(-1, -1, channels, -1, -1)
    whole = whole.cpu().numpy()
    common = {"normalise": False, "perturb_baseline": FILL, "disable_warnings": True, "return_aggregate": False}
    patch = channels * size * size
    if metrics == METRICS["pf"]:
        every = 1 if whole_patches else channels
        repeats, metric = 1, q.PixelFlipping(features_in_step=patch // every, **common)
        if whole_patches:
            metric.custom_preprocess = lambda *args, **kwargs: None
    else:
        subset = default_subset_size(P) * patch
        repeats, metric = TRIALS, q.FaithfulnessCorrelation(nr_runs=RUNS, subset_size=subset, **common)
    x, y = images.cpu().numpy(), np.full(len(images), TARGET)

    def run():
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for a_batch in whole:
                for _ in range(repeats):
                    scores = metric(model=model, x_batch=x, y_batch=y, a_batch=a_batch, device=images.device.type)
                found.append(torch.tensor(np.array(scores, dtype=float)))
        if metrics != METRICS["pf"]:
            return None
        curve = torch.stack(found)[..., every - 1 :: every]
        return (torch.cat([torch.full((*curve.shape[:2], 1), torch.nan), curve], -1),)

    return run


def no_quantus(only):
    def why_not(case, device):
        if case.metric != only:
            return "Quantus has no SaCo" if case.metric == "all" else "another metric"
        if case.C > 1:
            return "it judges one map after another, so C maps take C times as long"
        return None if importlib.util.find_spec("quantus") else "Quantus is not installed"

    return why_not


def many_images(case, device):
    return f"{case.B} images take {case.B} times as long" if case.B > 1 else None


def part(given):
    model, images, maps, metrics = given
    return model, images[:1], maps[:1, :1], metrics


def pick(result, given):
    """The first image under the first map. A single curve loses its unperturbed point, which Quantus does not have."""
    first = 1 if given[3] == METRICS["pf"] else 0
    return tuple(t[0, 0].flatten()[first:] for t in result)


def work(case):
    """The forwards that each metric needs for each map separately."""
    P, d = case.grid**2, case.d
    asked = {"pf": P + 1, "fc": TRIALS * (RUNS + 1), "all": P + 1 + TRIALS * (RUNS + 1) + -(-P // 4) + 1}[case.metric]
    N = P + 1
    one = 12 * (12 * N * d * d + 2 * N * N * d) + P * 3 * case.patch**2 * d
    return Work(0, 2 * one * asked * case.B * case.C)


PROVIDERS = {
    "tokens": Provider(evaluate("tokens"), backend="auto"),
    "pixels": Provider(evaluate("pixels"), backend="auto"),
    "one at a time": Provider(lambda *given: partial(one_at_a_time, *given), bar="whole", why_not=many_images),
    "Quantus, Pixel Flipping": Provider(quantus, bar="whole", why_not=no_quantus("pf")),
    "Quantus, whole patches": Provider(partial(quantus, whole_patches=True), bar="whole", why_not=no_quantus("pf")),
    "Quantus, Faithfulness Correlation": Provider(quantus, bar="part", why_not=no_quantus("fc")),
}


def vit(patch, grid, d, B, C, dtype="float32"):
    return [Case({"metric": m, "patch": patch, "grid": grid, "d": d, "B": B, "C": C}, dtype) for m in METRICS]


SUITE = Suite(
    "evaluate",
    small=vit(32, 4, 192, 1, 1),
    full=[
        *vit(32, 7, 768, 1, 1),
        *vit(32, 7, 768, 1, 9)[:2],
        *vit(16, 14, 768, 1, 1),
        *vit(32, 7, 768, 64, 3, "bfloat16")[2:],
        *vit(16, 14, 768, 64, 1, "bfloat16")[2:],
    ],
    providers=PROVIDERS,
    arguments=arguments,
    part=part,
    pick=pick,
    exact=one_at_a_time,
    work=work,
    tolerance=1e-3,  # the scores are made of small differences between logits
)


def test_evaluate(bench, case, provider):
    bench(SUITE, case, provider)
