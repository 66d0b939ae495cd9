"""The client for OpenAI-compatible endpoints; its use is tested with the judge and vlm_judge."""

import time

import pytest

for module in ("httpx2", "tenacity"):
    pytest.importorskip(module)


from reward_bridge import openai_chat  # noqa: E402


def test_retry_after_is_seconds_or_a_date():
    assert openai_chat.retry_after("7") == 7
    assert openai_chat.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    in_a_minute = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 55 < openai_chat.retry_after(in_a_minute) < 61
    assert openai_chat.retry_after("") == openai_chat.retry_after("soon") == 0


def test_no_text_keeps_the_key_or_the_address():
    endpoint = openai_chat.Endpoint("m", "https://user:pass@api.example.com:8443/v1", "s3cret")
    text = "s3cret https://user:pass@api.example.com:8443/v1 user:pass api.example.com:8443"
    assert endpoint.scrub(text) == "... ... ... ..."
    assert "s3cret" not in repr(endpoint)
    assert "example" not in repr(endpoint)
    assert endpoint.excerpt("a\n  b" + 400 * "c") == "a b" + 297 * "c"
    with pytest.raises(ValueError, match="KEY holds characters that an HTTP header") as raised:
        openai_chat.check_key("s3\ncret", "KEY")
    assert "cret" not in str(raised.value)
