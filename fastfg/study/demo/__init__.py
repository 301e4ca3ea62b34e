"""``fastfg demo`` on real weights and real photographs, and what only the demo uses."""

from fastfg.study.demo.run import Settings, run_demo

__all__ = ["Settings", "run_demo"]
