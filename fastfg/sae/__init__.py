"""Sparse autoencoders (SAEs): the model, the checkpoint formats, and training."""

from fastfg.sae.checkpoints import load_sae, load_saes
from fastfg.sae.model import SparseAutoencoder
from fastfg.sae.report import SAEReport
from fastfg.sae.train import train_sae

__all__ = ["SAEReport", "SparseAutoencoder", "load_sae", "load_saes", "train_sae"]
