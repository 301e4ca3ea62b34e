"""Builds the package ``fastfg``, ``kernels/triton`` as ``fastfg.kernels``, and the native ops as ``fastfg._C``.

FASTFG_BUILD selects how the native ops are built. ``auto`` (default) builds them if torch and a compiler are present,
else warns and installs only the Python part. ``require`` fails if they cannot be built. ``skip`` does not build them.
torch must be installed first, and pip needs --no-build-isolation: the ops must be built with the torch that loads them.

FASTFG_SANITIZE=1 builds them with AddressSanitizer and UndefinedBehaviorSanitizer, for tests (``make sanitize``).
"""

import os
import subprocess
import warnings
from pathlib import Path

from setuptools import find_packages, setup

MODE = os.environ.get("FASTFG_BUILD", "auto")
if MODE not in ("auto", "require", "skip"):
    raise SystemExit(f"FASTFG_BUILD: expected auto, require or skip, got {MODE!r}")


# -O1 keeps the tests fast enough. vptr is off because it needs type information that torch's libraries do not export.
SANITIZERS = (
    ["-O1", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS", "-fno-sanitize-recover=undefined"],
    ["-fsanitize=address,undefined", "-fno-sanitize=vptr"],
)


def vector_flags() -> list[str]:
    """Compiler flags for this machine's vector instructions, and for at::vec's backend that uses them."""
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
    """The arguments of setup() that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """Turns a failed build into a warning, unless FASTFG_BUILD=require."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if MODE == "require":
                    raise
                warnings.warn(
                    f"fastfg's native ops were not built ({error}); installing the Python part alone", stacklevel=1
                )
                self.extensions = []

        def copy_extensions_to_source(self) -> None:
            if self.extensions:
                super().copy_extensions_to_source()

    compile_more, link_more = SANITIZERS if os.environ.get("FASTFG_SANITIZE") == "1" else ([], [])
    extension = CppExtension(
        "fastfg._C",
        sorted(str(path) for path in Path("csrc").glob("**/*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("**/*.h")),
        extra_compile_args=["-O3", "-fopenmp", *vector_flags(), *compile_more, *link_more],
        extra_link_args=["-fopenmp", *link_more],
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
