"""Batch files: what a line asks, and an error record for every line that cannot be run."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime_min.batch_file import (
    Answer,
    Failure,
    Request,
    answer_record,
    failure_record,
    parse_line,
    read_requests,
    record_line,
)

COMPLETION = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once"}}
CHAT = {
    "custom_id": "c",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "Hello"}]},
}


def parse(data: object) -> Request | Failure:
    return parse_line(1, json.dumps(data).encode())


def with_body(**body: object) -> Request | Failure:
    return parse({**COMPLETION, "body": {**COMPLETION["body"], **body}})


def test_defaults():
    """Those of the API: 16 tokens for a completion, the rest of the context for a chat, temperature 1."""
    request = parse(COMPLETION)
    assert request == Request(1, "a", "Once", None, 16, 1.0, 1.0, None, (), None)
    chat = parse(CHAT)
    assert isinstance(chat, Request)
    assert (chat.prompt, chat.max_tokens) == (({"role": "user", "content": "Hello"},), None)


def test_parameters():
    request = with_body(
        model="m", max_tokens=3, temperature=0, top_p=0.5, seed=-4, stop=["x", "y"], n=1, user="u"
    )
    assert request == Request(1, "a", "Once", "m", 3, 0.0, 0.5, -4, ("x", "y"), None)
    assert with_body(stop="x", max_completion_tokens=2, logprobs=0).logprobs == 0


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    chat = parse({**CHAT, "body": {"messages": [{"role": "user", "content": parts}]}})
    assert chat.prompt == ({"role": "user", "content": "Hello"},)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"prompt": ["one", "two"]}, "invalid_parameter"),
        ({"prompt": None}, "invalid_parameter"),
        ({"prompt": "half \ud800"}, "invalid_parameter"),
        ({"n": 2}, "unsupported_parameter"),
        ({"n": True}, "unsupported_parameter"),
        ({"stream": True}, "unsupported_parameter"),
        ({"logprobs": 6}, "invalid_parameter"),
        ({"logprobs": True}, "invalid_parameter"),
        ({"top_logprobs": 2}, "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "unsupported_parameter"),
        ({"top_k": 4}, "unsupported_parameter"),
        ({"messages": []}, "unsupported_parameter"),
        ({"max_tokens": 0}, "invalid_parameter"),
        ({"max_tokens": 1.5}, "invalid_parameter"),
        ({"max_tokens": True}, "invalid_parameter"),
        ({"temperature": -0.1}, "invalid_parameter"),
        ({"temperature": float("nan")}, "invalid_parameter"),
        ({"temperature": float("inf")}, "invalid_parameter"),
        ({"top_p": 0}, "invalid_parameter"),
        ({"seed": 2**63}, "invalid_parameter"),
        ({"seed": "1"}, "invalid_parameter"),
        ({"stop": ""}, "invalid_parameter"),
        ({"stop": ["a"] * 5}, "invalid_parameter"),
        ({"stop": [1]}, "invalid_parameter"),
        ({"model": 3}, "invalid_parameter"),
    ],
)
def test_bodies_that_cannot_run(body, code):
    failure = with_body(**body)
    assert isinstance(failure, Failure)
    assert (failure.custom_id, failure.code) == ("a", code)


@pytest.mark.parametrize(
    ("line", "custom_id", "code"),
    [
        (b"{", None, "invalid_json"),
        (b"\xff\xfe", None, "invalid_json"),
        (b"[]", None, "invalid_json"),
        (b"[" * 100_000, None, "invalid_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", None, "invalid_json"),
        (b'{"url": "/v1/completions"}', None, "missing_custom_id"),
        (b'{"custom_id": 7}', None, "missing_custom_id"),
        (b'{"custom_id": "a"}', "a", "invalid_url"),
        (b'{"custom_id": "a", "url": "/v1/embeddings"}', "a", "invalid_url"),
        (b'{"custom_id": "a", "url": ["/v1/completions"]}', "a", "invalid_url"),
        (b'{"custom_id": "a", "method": "GET", "url": "/v1/completions"}', "a", "invalid_method"),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": "x"}', "a", "invalid_body"),
    ],
)
def test_lines_that_cannot_run(line, custom_id, code):
    failure = parse_line(12, line)
    assert isinstance(failure, Failure)
    assert (failure.line, failure.custom_id, failure.code) == (12, custom_id, code)
    assert failure.message.startswith("line 12: ")


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "Hello",
        [],
        ["Hello"],
        [{"role": "user"}],
        [{"content": "Hello"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "assistant", "content": "x", "tool_calls": []}],
    ],
)
def test_messages_that_cannot_run(messages):
    assert isinstance(parse({**CHAT, "body": {"messages": messages}}), Failure)


def test_the_first_of_equal_custom_ids_runs(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [json.dumps(COMPLETION), "", json.dumps(CHAT), json.dumps(COMPLETION), "{"]
    path.write_text("\n".join(lines))
    items = list(read_requests(path))
    assert [type(item) for item in items] == [Request, Request, Failure, Failure]
    assert [item.line for item in items] == [1, 3, 4, 5]
    assert items[2].code == "duplicate_custom_id"


def test_records_have_the_api_form():
    answer = Answer(text=" upon", finish="stop", prompt_tokens=2, completion_tokens=3)
    record = answer_record(parse(COMPLETION), answer, "tiny")
    assert record["error"] is None
    assert record["custom_id"] == "a"
    assert record_line(record) == 1
    body = record["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [{"index": 0, "text": " upon", "finish_reason": "stop", "logprobs": None}]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    chat = answer_record(parse(CHAT), answer, "tiny")["response"]["body"]
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": " upon"}
    failure = failure_record(Failure(3, None, "invalid_json", "line 3: is not JSON"))
    assert failure["response"] is None
    assert failure["error"]["code"] == "invalid_json"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "model", "tools"]


@settings(max_examples=200)
@given(
    st.binary()
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.builds(
        lambda data, body: json.dumps({**COMPLETION, **data, "body": body}).encode(),
        st.dictionaries(st.sampled_from(["custom_id", "method", "url"]), JSON, max_size=1),
        st.dictionaries(st.sampled_from(FIELDS), JSON),
    )
)
def test_any_line_gives_a_request_or_a_record(line):
    """Nothing escapes as an exception, and every record can be written and read back."""
    item = parse_line(5, line)
    if isinstance(item, Failure):
        assert json.loads(json.dumps(failure_record(item)))["error"]["code"]
    else:
        assert item.line == 5
        assert item.custom_id
        assert 0 <= item.temperature <= 2
        assert 0 < item.top_p <= 1
