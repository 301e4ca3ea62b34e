"""Packages: ``fastfg`` as it lies, ``kernels/triton`` as ``fastfg.kernels``, and the native ops as ``fastfg._C``.

FASTFG_BUILD=auto (default) builds the native ops where torch and a compiler are there, and warns and goes on in pure
Python where they are not; ``require`` fails instead; ``skip`` does not try. torch must be installed already, and pip
told --no-build-isolation: a torch of the build's own could differ from the one that loads the ops.
"""

import os
import subprocess
import warnings
from pathlib import Path

from setuptools import find_packages, setup

MODE = os.environ.get("FASTFG_BUILD", "auto")
if MODE not in ("auto", "require", "skip"):
    raise SystemExit(f"FASTFG_BUILD: expected auto, require or skip, got {MODE!r}")


def vector_flags() -> list[str]:
    """The machine's own instructions, and the name of at::vec's backend for them."""
    compiler = os.environ.get("CXX", "c++")
    defines = subprocess.run(
        [compiler, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=False
    ).stdout
    for macros, name in (
        (("__AVX512F__", "__AVX512VL__", "__AVX512BW__", "__AVX512DQ__"), "AVX512"),
        (("__AVX2__", "__FMA__"), "AVX2"),
    ):
        if all(f"{macro} " in defines for macro in macros):
            return ["-march=native", f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]
    return []


def native() -> dict[str, object]:
    """The extension, as arguments of setup()."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """A build that fails is an error only where it is required."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if MODE == "require":
                    raise
                warnings.warn(f"fastfg's native ops were not built ({error}); going on in pure Python", stacklevel=1)
                self.extensions = []

        def copy_extensions_to_source(self) -> None:
            if self.extensions:
                super().copy_extensions_to_source()

    extension = CppExtension(
        "fastfg._C",
        sorted(str(path) for path in Path("csrc").glob("**/*.cpp")),
        extra_compile_args=["-O3", "-fopenmp", *vector_flags()],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


def build() -> dict[str, object]:
    if MODE == "skip":
        return {}
    try:
        return native()
    except ImportError as error:
        if MODE == "require":
            raise
        warnings.warn(f"fastfg's native ops are not built: {error} (--no-build-isolation?)", stacklevel=1)
        return {}


setup(
    packages=[*find_packages(include=["fastfg", "fastfg.*"]), "fastfg.kernels"],
    package_dir={"fastfg.kernels": "kernels/triton"},
    **build(),
)
