"""The package list. Everything else stands in pyproject.toml.

Commands and shipped configs lie in scripts/ and configs/, where people look for them. They are installed as
realgen_scripts and realgen_configs, since the bare names would collide with other projects' folders.
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
