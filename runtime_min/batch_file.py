"""OpenAI batch files: one request a line in, one record a line out. Standard library only.

A line that cannot be run becomes an error record; it never keeps the others from running. Records carry no
clock and no random identifier: the same input gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as in the API it follows

# Parameters that are accepted as long as they ask for nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "response_format": ({"type": "text"},),
}
IGNORED = {"model", "user", "metadata", "store", "service_tier"}
READ = {"max_tokens", "temperature", "top_p", "seed", "stop", "logprobs"}
MOST_LOGPROBS, MOST_TOP_LOGPROBS = 5, 20  # of /v1/completions and of /v1/chat/completions


@dataclass(frozen=True, slots=True)
class Request:
    """One request as asked. `prompt` is text, or the messages of a chat; `max_tokens` None means the rest.

    `logprobs` is how many of the best tokens are to be told beside each one's log-probability; None: neither.
    """

    line: int
    custom_id: str
    prompt: str | tuple[dict[str, str], ...]
    model: str | None
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    logprobs: int | None


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token as text and bytes, and its log-probability."""

    text: str
    utf8: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Place:
    """A token of an answer, where its text begins there, and the best tokens of its place, best first."""

    token: TokenScore
    offset: int
    best: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A line that is answered with an error; `custom_id` is None where it has none."""

    line: int
    custom_id: str | None
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request got. Token counts include the end token; `places` are those of the text's tokens."""

    text: str
    finish: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    places: tuple[Place, ...] | None = None


def failure(item: Request | Failure, code: str, message: str) -> Failure:
    """The line of `item` is answered with an error."""
    return Failure(item.line, item.custom_id, code, f"line {item.line}: {message}")


class _InvalidError(Exception):
    """The line cannot be run: code, message."""


def read_requests(path: Path) -> Iterator[Request | Failure]:
    """The lines of `path` in order, blank ones left out; only the first of equal custom_ids runs."""
    seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _unique(parse_line(number, line), seen)


def _unique(item: Request | Failure, seen: dict[str, int]) -> Request | Failure:
    if item.custom_id is None:
        return item
    first = seen.setdefault(item.custom_id, item.line)
    if first == item.line:
        return item
    message = f"custom_id {item.custom_id!r} is already used in line {first}"
    return failure(item, "duplicate_custom_id", message)


def parse_line(number: int, line: bytes) -> Request | Failure:
    """One line of a batch file; never raises."""
    custom_id = None
    try:
        data = _load(line)
        custom_id = data.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            custom_id = None
            raise _InvalidError("missing_custom_id", "custom_id must be a text that is not empty")
        return _request(number, custom_id, data)
    except _InvalidError as error:
        code, message = error.args
        return Failure(number, custom_id, code, f"line {number}: {message}")


def _load(line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _InvalidError("invalid_json", f"is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise _InvalidError("invalid_json", "is not a JSON object")
    return data


def _request(number: int, custom_id: str, data: dict[str, Any]) -> Request:
    if data.get("method", "POST") != "POST":
        raise _InvalidError("invalid_method", f"method is {data['method']!r}, expected 'POST'")
    url = data.get("url")
    if url not in (COMPLETIONS, CHAT):
        raise _InvalidError("invalid_url", f"url is {url!r}, expected {COMPLETIONS} or {CHAT}")
    if not isinstance(data.get("body"), dict):
        raise _InvalidError("invalid_body", "body must be an object")
    body = {key: value for key, value in data["body"].items() if value is not None}
    prompt_key = "messages" if url == CHAT else "prompt"
    _check_parameters(body, prompt_key)
    return Request(
        line=number,
        custom_id=custom_id,
        prompt=_messages(body.get("messages")) if url == CHAT else _text(body.get("prompt"), "prompt"),
        model=_text(body["model"], "model") if "model" in body else None,
        max_tokens=_max_tokens(body, None if url == CHAT else DEFAULT_MAX_TOKENS),
        temperature=_number(body, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(body, "top_p", 1.0, 0.0, 1.0),
        seed=_integer(body["seed"], "seed", -(2**63), 2**63 - 1) if "seed" in body else None,
        stop=_stop(body.get("stop", [])),
        logprobs=_logprobs(body, url == CHAT),
    )


def _check_parameters(body: dict[str, Any], prompt_key: str) -> None:
    known = IGNORED | READ | {prompt_key, "max_completion_tokens"}
    known |= {"top_logprobs"} if prompt_key == "messages" else set()
    for key, value in body.items():
        neutral = NEUTRAL.get(key, ())
        if key not in known and not any(value == n and type(value) is type(n) for n in neutral):
            asked = f"{key} = {json.dumps(value)[:100]}"
            raise _InvalidError("unsupported_parameter", f"{asked} is not supported")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _InvalidError("invalid_parameter", f"{name} must be one text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _InvalidError("invalid_parameter", f"{name} holds half of a surrogate pair") from None
    return value


def _messages(value: object) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise _InvalidError("invalid_parameter", "messages must be a list of objects that is not empty")
    return tuple(_message(item) for item in value)


def _message(item: dict[str, Any]) -> dict[str, str]:
    unknown = sorted(set(item) - {"role", "content", "name"})
    if unknown:
        raise _InvalidError("unsupported_parameter", f"messages: {unknown[0]} is not supported")
    content = item.get("content")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    message = {"role": _text(item.get("role"), "role"), "content": _text(content, "content")}
    return message | ({"name": _text(item["name"], "name")} if "name" in item else {})


def _part(part: object) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
    raise _InvalidError("unsupported_parameter", "content parts other than text are not supported")


def _max_tokens(body: dict[str, Any], default: int | None) -> int | None:
    asked = [key for key in ("max_tokens", "max_completion_tokens") if key in body]
    return min((_integer(body[key], key, 1, 2**31) for key in asked), default=default)


def _logprobs(body: dict[str, Any], chat: bool) -> int | None:
    """A chat says whether and then how many; a completion says how many."""
    asked = body.get("logprobs")
    if not chat:
        return None if asked is None or asked is False else _integer(asked, "logprobs", 0, MOST_LOGPROBS)
    if asked is not None and not isinstance(asked, bool):
        raise _InvalidError("invalid_parameter", "logprobs must be true or false")
    top = body.get("top_logprobs")
    if top is not None and not asked:
        raise _InvalidError("invalid_parameter", "top_logprobs needs logprobs: true")
    return _integer(top or 0, "top_logprobs", 0, MOST_TOP_LOGPROBS) if asked else None


def _integer(value: object, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _InvalidError("invalid_parameter", f"{name} must be a whole number from {low} to {high}")
    return value


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise _InvalidError("invalid_parameter", f"{name} must be a number from {low} to {high}")
    if name == "top_p" and value == 0:
        raise _InvalidError("invalid_parameter", "top_p must be above 0")
    return float(value)


def _stop(value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or len(items) > 4:
        raise _InvalidError("invalid_parameter", "stop must be a text or a list of up to 4")
    stops = tuple(_text(item, "stop") for item in items)
    if "" in stops:
        raise _InvalidError("invalid_parameter", "stop must not be empty")
    return stops


def answer_record(request: Request, answer: Answer, model: str) -> dict[str, Any]:
    """The output record of a request that ran; `model` names what it asked no name for."""
    chat = not isinstance(request.prompt, str)
    said = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
    scores = None if answer.places is None else (_chat_scores if chat else _scores)(answer.places)
    choice = {"index": 0, **said, "finish_reason": answer.finish, "logprobs": scores}
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{request.line}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": request.model or model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
    }
    response = {"status_code": 200, "request_id": f"req_{request.line}", "body": body}
    return {**_head(request.line, request.custom_id), "response": response, "error": None}


def _chat_scores(places: tuple[Place, ...]) -> dict[str, Any]:
    def entry(token: TokenScore) -> dict[str, Any]:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.utf8)}

    content = [{**entry(p.token), "top_logprobs": [entry(best) for best in p.best]} for p in places]
    return {"content": content, "refusal": None}


def _scores(places: tuple[Place, ...]) -> dict[str, Any]:
    """The logprobs of a completion's choice; of best tokens with the same text, the better one's."""
    return {
        "tokens": [p.token.text for p in places],
        "token_logprobs": [p.token.logprob for p in places],
        "top_logprobs": [{best.text: best.logprob for best in reversed(p.best)} for p in places],
        "text_offset": [p.offset for p in places],
    }


def failure_record(failure: Failure) -> dict[str, Any]:
    """The output record of a line that did not run."""
    error = {"code": failure.code, "message": failure.message}
    return {**_head(failure.line, failure.custom_id), "response": None, "error": error}


def _head(line: int, custom_id: str | None) -> dict[str, Any]:
    return {"id": f"batch_req_{line}", "custom_id": custom_id}


def record_line(record: dict[str, Any]) -> int:
    """The input line that a record answers."""
    return int(record["id"].rpartition("_")[2])
