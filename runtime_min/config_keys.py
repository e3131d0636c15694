"""Typed access to a checkpoint's config.json, under the names that an architecture gives its keys."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from moeplan.runtime_min.models.architecture import Architecture


class Keys:
    """Notes every problem in `problems` and hands out a default in place of a wrong value."""

    def __init__(self, config: Mapping[str, Any], kind: Architecture) -> None:
        self.problems: list[str] = []
        self._outer = self._config = config
        self._names = dict(kind.keys)
        if kind.inner:
            self._config = self._object(kind.inner, config.get(kind.inner))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; `default` where it is absent or null."""
        place, last = self._find(key)
        value = place.get(last)
        if value is None and last in ("tie_word_embeddings", "eos_token_id", "quantization_config"):
            value = self._outer.get(last)
        return default if value is None else value

    def said(self, key: str) -> bool:
        """Whether `key` is there, null or not."""
        place, last = self._find(key)
        return last in place

    def _find(self, key: str) -> tuple[Mapping[str, Any], str]:
        """The object where `key` should be, and its name there."""
        *groups, last = self._names.get(key, key).split(".")
        place: Any = self._config
        for group in groups:
            place = place.get(group) if isinstance(place, Mapping) else None
        return place if isinstance(place, Mapping) else {}, last

    def first(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        """The first of `keys` that is there, and its value."""
        key = next((key for key in keys if self.get(key) is not None), keys[0])
        return self._names.get(key, key), self.get(key)

    def number(self, key: str, default: float = 0.0) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            self.problems.append(f"{key} is {value!r}, expected a positive number")
            return default
        return float(value)

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.problems.append(f"{key} is {value!r}, expected a whole number")
            return least
        return value

    def numbers(self, key: str, count: int) -> tuple[int, ...] | None:
        """A list of `count` whole numbers; None where it is absent, null or empty."""
        value = self.get(key)
        if not value:
            return None
        if not isinstance(value, list) or len(value) < count or not all(isinstance(v, int) for v in value):
            self.problems.append(f"{key} is {value!r}, expected {count} whole numbers")
            return None
        return tuple(value)

    def group(self, *keys: str) -> Keys:
        """Access to the first of these objects that is there and not empty; its problems are these."""
        inner = copy(self)
        inner._names, inner._outer = {}, {}
        inner._config = self._object(keys[0], next(filter(None, map(self.get, keys)), {}))
        return inner

    def _object(self, key: str, value: object) -> Mapping[str, Any]:
        if isinstance(value, Mapping):
            return value
        self.problems.append(f"{key} is {value!r}, expected an object")
        return {}
