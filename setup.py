"""The build. Everything declarative is in pyproject.toml; compiled extensions join here when they exist."""

from setuptools import setup

setup()
