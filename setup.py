"""Adds the command lines of tools/ to the package as megatron_ext.tools; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megatron_ext", "megatron_ext.*"]), "megatron_ext.tools"],
    package_dir={"megatron_ext.tools": "tools"},
)
