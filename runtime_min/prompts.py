"""Text to tokens and back, with the checkpoint's own tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeplan.runtime_min.batch_file import Request
from moeplan.runtime_min.checkpoint import CheckpointError, read_json

CONTEXT = 8  # tokens of the prompt that are decoded together with the answer, for the space between them


class PromptError(Exception):
    """This request's prompt cannot be made; the others can."""


class Prompts:
    """The tokenizer of a checkpoint folder; its chat template is read at the first chat."""

    def __init__(self, folder: Path, vocab: int) -> None:
        from tokenizers import Tokenizer

        self._folder = folder
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise CheckpointError([f"{path}: cannot be read: {error}"]) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        size = self._tokenizer.get_vocab_size()
        if size > vocab:
            raise CheckpointError([f"{path}: has {size} tokens, the model {vocab}"])
        self._template: ChatTemplate | None = None
        self._byte_level: dict[str, Any] | None = None

    def encode(self, request: Request) -> list[int]:
        """The prompt's tokens, with those the tokenizer or the chat template puts around it."""
        chat = not isinstance(request.prompt, str)
        text = request.prompt if isinstance(request.prompt, str) else self._chat(request.prompt)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not chat).ids
        if not ids:
            raise PromptError("the prompt has no tokens")
        return ids

    def decode(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """The text of `answer` as it continues `prompt`."""
        before: str = self._tokenizer.decode(list(prompt[-CONTEXT:]))
        both: str = self._tokenizer.decode([*prompt[-CONTEXT:], *answer])
        if both.startswith(before):
            return both[len(before) :]
        alone: str = self._tokenizer.decode(list(answer))  # the prompt ends within a character
        return alone

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for: part of a character where the vocabulary is of bytes."""
        text: str = self._tokenizer.id_to_token(token) or ""
        if self._byte_level is None:
            self._byte_level = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        if _has_kind(self._byte_level, "ByteLevel") and all(letter in _BYTES for letter in text):
            return bytes(_BYTES[letter] for letter in text)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
        return text.replace("\u2581", " ").encode()

    def _chat(self, messages: tuple[dict[str, str], ...]) -> str:
        if self._template is None:
            self._template = ChatTemplate(self._folder)
        return self._template.render(messages)


def _has_kind(decoder: dict[str, Any], kind: str) -> bool:
    """Whether the decoder of a tokenizer.json is of `kind`, or one of its steps is."""
    return decoder.get("type") == kind or any(_has_kind(d, kind) for d in decoder.get("decoders", ()))


def _byte_letters() -> dict[str, int]:
    """The byte of each letter of a byte-level vocabulary: bytes that print stand for themselves (GPT-2)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): byte for byte in printed}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()


class ChatTemplate:
    """A checkpoint's chat template, rendered in a sandbox: checkpoints come from anywhere."""

    def __init__(self, folder: Path) -> None:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        config = read_json(folder / "tokenizer_config.json")
        self._names = _special_tokens(config)
        self._errors = (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
        )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment.globals["raise_exception"] = raise_exception
        source = _template_source(folder, config)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise PromptError(f"the checkpoint's chat template is malformed: {error}") from None

    def render(self, messages: tuple[dict[str, str], ...]) -> str:
        """The text of a chat, up to where the assistant speaks."""
        copies = [dict(message) for message in messages]
        try:
            return self._template.render(
                messages=copies, tools=None, documents=None, add_generation_prompt=True, **self._names
            )
        except self._errors as error:
            raise PromptError(f"the chat template refuses these messages: {error}") from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _template_source(folder: Path, config: dict[str, Any]) -> str:
    """chat_template.jinja, or the template of this name in tokenizer_config.json (the default of several)."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise PromptError("the checkpoint has no chat template")
    return template


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token and the like, for the template; each is a text or an object that holds one."""
    names = {}
    for key in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    return names
