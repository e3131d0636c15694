"""Typed access to a checkpoint's config.json, under the names that an architecture gives its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeplan.runtime_min.models.architecture import Architecture


class Keys:
    """Notes every problem in `problems` and hands out a default in place of a wrong value."""

    def __init__(self, config: Mapping[str, Any], kind: Architecture) -> None:
        self.problems: list[str] = []
        self._outer = config
        self._config = self._group(config, kind.inner) if kind.inner else config
        self._names = dict(kind.keys)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; `default` where it is absent or null."""
        *groups, last = self._names.get(key, key).split(".")
        place: Any = self._config
        for group in groups:
            place = place.get(group) if isinstance(place, Mapping) else None
        value = place.get(last) if isinstance(place, Mapping) else None
        if value is None and last in ("tie_word_embeddings", "eos_token_id", "quantization_config"):
            value = self._outer.get(last)
        return default if value is None else value

    def said(self, key: str) -> bool:
        """Whether `key` is there, null or not."""
        *groups, last = self._names.get(key, key).split(".")
        place: Any = self._config
        for group in groups:
            place = place.get(group) if isinstance(place, Mapping) else None
        return isinstance(place, Mapping) and last in place

    def first(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        """The first of `keys` that is there, and its value."""
        key = next((key for key in keys if self.get(key) is not None), keys[0])
        return self._names.get(key, key), self.get(key)

    def number(self, key: str, default: float) -> float:
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

    def _group(self, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = config.get(key)
        if isinstance(value, Mapping):
            return value
        self.problems.append(f"{key} is {value!r}, expected an object")
        return {}
