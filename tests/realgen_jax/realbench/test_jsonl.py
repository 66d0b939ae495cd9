import pytest

from realgen_jax.realbench.jsonl import read_jsonl, remove_incomplete_line


def test_a_last_line_that_was_cut_off_is_ignored_and_removed(tmp_path):
    file = tmp_path / "a.jsonl"
    assert read_jsonl(file) == []
    remove_incomplete_line(file)
    file.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}')
    assert read_jsonl(file) == [{"a": 1}, {"a": 2}]
    assert file.read_text().endswith('{"a": 3}')  # reading changes nothing
    remove_incomplete_line(file)
    assert file.read_text() == '{"a": 1}\n{"a": 2}\n'
    file.write_bytes(b'{"a": "\xc3')
    remove_incomplete_line(file)
    assert file.read_bytes() == b""


def test_a_line_that_is_not_json_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\nnot JSON\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, is not JSON .*remove that line"):
        read_jsonl(file)
