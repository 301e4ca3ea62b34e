"""Packages: ``fastfg`` as it lies, and ``kernels/triton`` as ``fastfg.kernels``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastfg", "fastfg.*"]), "fastfg.kernels"],
    package_dir={"fastfg.kernels": "kernels/triton"},
)
