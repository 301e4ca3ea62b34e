"""The study that ``fastfg demo`` runs on real weights and real photographs, and the code that only the demo uses."""

from fastfg.study.demo.run import Settings, run_demo

__all__ = ["Settings", "run_demo"]
