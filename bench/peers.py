"""Trainers of other libraries behind one interface, for :mod:`bench.train_sae`. Each is imported when it is asked for.

Each makes an SAE of d dimensions, F features and K active ones, with ``dead`` features that have a low bias and count
as dead, and has ``step(x)``, which trains on tokens [T, d] as the library's own training loop does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from typing import Any

import torch
from torch import Tensor

from fastfg.models.timm import import_timm

LR, DEAD_BIAS, LONG = 1e-4, -2.0, 10**9


class Overcomplete:
    """Its ``train_sae`` with ``monitoring=0``, which clips gradients and has no AuxK.

    The encoder has no normalisation. Overcomplete's own auxiliary loss takes half of the dictionary per token and does
    not know which features are dead, so the mean square error is used alone. The dictionary is divided by its norms in
    each step; gradients along its rows are not removed.
    """

    PACKAGE, MODULE = "overcomplete", "overcomplete.sae"

    def __init__(self, d: int, F: int, k: int, dead: int) -> None:
        library = imported(self)
        encoder = library.MLPEncoder(d, F, nb_blocks=1, norm_layer=torch.nn.Identity)
        self.model = library.TopKSAE(d, F, top_k=k, encoder_module=encoder)
        self.train = library.train_sae
        self.adam = torch.optim.Adam(self.model.parameters(), lr=LR)

    @staticmethod
    def loss(x: Tensor, x_hat: Tensor, pre: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    def step(self, x: Tensor) -> None:
        self.train(self.model, [x], self.loss, self.adam, nb_epochs=1, monitoring=0)


class SAELens:
    """``SAETrainer`` with a ``TopKTrainingSAE``, without logging.

    AuxK takes d / 2 dead features, from pre-activations of all. Pre-activations are multiplied by the norms of the
    decoder's rows, in place of rows of norm 1; gradients are clipped.
    Codes are dense, as by default: sparse ones (``use_sparse_activations``) fail on a CPU with torch 2.13.
    """

    PACKAGE, MODULE = "sae-lens", "sae_lens"

    def __init__(self, d: int, F: int, k: int, dead: int) -> None:
        library = imported(self)
        trainer = importlib.import_module("sae_lens.training.sae_trainer")
        config = importlib.import_module("sae_lens.config")
        sae = library.TopKTrainingSAE(library.TopKTrainingSAEConfig(d_in=d, d_sae=F, k=k))
        options = config.SAETrainerConfig(total_training_samples=LONG, train_batch_size_samples=4096, lr=LR, lr_end=LR)
        self.trainer = trainer.SAETrainer(options, sae, data_provider=iter(()))
        with torch.no_grad():
            sae.b_enc[:dead] = DEAD_BIAS
        self.trainer.n_forward_passes_since_fired[:dead] = LONG

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1


class Sparsify:
    """``SparseCoder`` with the steps of its ``Trainer``, whose loop reads a language model, and Adam.

    AuxK takes d / 2 dead features, from pre-activations of all. Rows have norm 1, and gradients along them are removed.
    The decoder is the one without Triton, which a CPU has.
    """

    PACKAGE, MODULE = "eai-sparsify", "sparsify"

    def __init__(self, d: int, F: int, k: int, dead: int) -> None:
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        library = imported(self)
        self.sae = library.SparseCoder(d, library.SparseCoderConfig(num_latents=F, k=k))
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=LR)
        self.since_fired = torch.zeros(F, dtype=torch.long)
        self.since_fired[:dead] = LONG
        with torch.no_grad():
            self.sae.encoder.bias[:dead] = DEAD_BIAS

    def step(self, x: Tensor) -> None:
        sae = self.sae
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=self.since_fired > 10_000_000)
        fired = torch.zeros(len(self.since_fired), dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self.adam.step()
        self.adam.zero_grad()
        self.since_fired += len(x)
        self.since_fired[fired] = 0


PEERS: dict[str, Any] = {
    "overcomplete": Overcomplete,
    "saelens": SAELens,
    "sparsify": Sparsify,
}


def imported(peer: Any) -> Any:
    try:
        import_timm()  # some import torchvision, which can't be imported first beside a torch for CPUs
        return importlib.import_module(peer.MODULE)
    except ImportError as error:
        raise SystemExit(
            f"--peers: expected the package {peer.PACKAGE} (pip install fastfg[peers]), got {error}"
        ) from error


def version(name: str) -> str:
    """The package of a peer and its version."""
    package = PEERS[name].PACKAGE
    return f"{package} {importlib.metadata.version(package)}"
