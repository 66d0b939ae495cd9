"""Configs of other projects, read and written as ours: `python -m realgen_jax.convert_config`.

reading: their file, without executing it. keys: the table of their keys. writing: our file.
"""
