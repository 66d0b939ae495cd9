"""The list of packages. Everything else is in pyproject.toml.

The commands are in scripts/ and the shipped configs in configs/, where people look for them. They
are installed as realgen_scripts and realgen_configs, because scripts and configs are names that
other projects use too.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["realgen_jax*", "reward_bridge*"]),
        "realgen_scripts",
        "realgen_configs",
    ],
    package_dir={"realgen_scripts": "scripts", "realgen_configs": "configs"},
)
