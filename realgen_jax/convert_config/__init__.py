"""Configs of other projects, read and written as ours: `python -m realgen_jax.convert_config`.

reading: their file, without executing it. keys: the table of their keys. conversion: the rules for
keys that differ. writing: our file. page, flow_factory: the tables of docs/from_elsewhere.md.
"""
