"""A decode pass that reads only the pages that routing hits: its tasks, and the time they take together."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Of the pages guessed by giving a layer's hidden states, before its experts have computed, to the next
# layer's router, this part is hit. Measured on examples/tinymoe (8 experts, 2 a token, one sequence, two
# guesses a layer): 0.73; 0.88 with one guess. Other models' will differ: the interval reaches down to none.
RIGHT_SHARE = 0.73
_SIMULATED_LAYERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedLayer:
    """Seconds of one layer's tasks, of a mean pass.

    `attention_s` includes routing, `expect_s` is the next layer's guess. `hits_s` are by place, those of the
    `guesses` first, each of whose reads takes `guess_s`; `fetches_s` by place without them.
    """

    attention_s: float
    attention_read_s: float
    expect_s: float
    resident_s: tuple[float, ...]
    hits_s: tuple[float, ...]
    fetches_s: tuple[float, ...]
    guesses: int
    guess_s: float

    @property
    def cores_s(self) -> float:
        return self.attention_s + self.expect_s + sum(self.resident_s) + sum(self.hits_s)

    @property
    def disk_s(self) -> float:
        return self.attention_read_s + sum(self.fetches_s) + self.guesses * self.guess_s

    def scaled(self, cores: float, disk: float) -> RoutedLayer:
        """The same tasks, so much longer."""
        return replace(
            self,
            attention_s=self.attention_s * cores,
            attention_read_s=self.attention_read_s * disk,
            expect_s=self.expect_s * cores,
            resident_s=tuple(s * cores for s in self.resident_s),
            hits_s=tuple(s * cores for s in self.hits_s),
            fetches_s=tuple(s * disk for s in self.fetches_s),
            guess_s=self.guess_s * disk,
        )


def expected_use(hit_pages: float, places: int) -> tuple[float, ...]:
    """How much of each place a mean pass uses: the first so many are full."""
    return tuple(min(1.0, max(0.0, hit_pages - place)) for place in range(places))


def entering_passes(passes: float, sequences: int, mean_tokens: float) -> float:
    """Of `passes` decode passes, those in which some of `sequences` requests have just ended, so that prompts
    enter and whole layers are read: each ends with every 1/`mean_tokens`, apart from the others."""
    return passes * (1.0 - (1.0 - 1.0 / max(1.0, mean_tokens)) ** sequences)


def routed_seconds(at: RoutedLayer, slots: int, layers: int, ends_s: float) -> float:
    """Seconds of one pass among many alike, in the order of planner/programs/stream.py.

    A place's page is read once the layer is routed; guesses follow the reads of the layer before. `ends_s`
    is arithmetic outside the layers. Of many layers some stand for all.
    """
    simulated = min(layers, _SIMULATED_LAYERS)
    clock = _Clock(at, slots)
    first = 0.0
    clock.read_attention()
    for _ in range(2):  # the second pass begins with the page of attention there
        first = clock.cores
        clock.expect()
        clock.guess()
        for layer in range(simulated):
            last = layer + 1 == simulated
            clock.compute_layer(last)
            clock.read_attention()
            if not last:
                clock.guess()
        clock.cores += ends_s * simulated / layers
    return (clock.cores - first) * layers / simulated


class _Clock:
    """When the cores and the disk are done with what was issued, and when each place in the ring was used."""

    def __init__(self, at: RoutedLayer, slots: int) -> None:
        self.cores = self._disk = 0.0
        self._at, self._slots = at, slots
        self._expected = self._attention_there = 0.0
        self._guessed: list[float] = []  # when the next layer's guesses are there
        self._used: list[float] = []  # by place in the ring

    def read_attention(self) -> None:
        if self._at.attention_read_s:
            self._read(len(self._used), self._at.attention_read_s)
            self._attention_there = self._disk

    def expect(self) -> None:
        self.cores += self._at.expect_s
        self._expected = self.cores

    def guess(self) -> None:
        first = len(self._used) + (self._at.attention_read_s > 0)
        for place in range(self._at.guesses):
            self._read(first + place, self._at.guess_s, self._expected)
            self._guessed.append(self._disk)

    def compute_layer(self, last: bool) -> None:
        at = self._at
        self.cores = routed = max(self.cores, self._attention_there) + at.attention_s
        if at.attention_read_s:
            self._used.append(routed)
        if not last:
            self.expect()
        self.cores += sum(at.resident_s)
        guessed, self._guessed = self._guessed, []
        for hit_s, there in zip(at.hits_s, guessed, strict=False):
            self._hit(hit_s, there)
        for hit_s, fetch_s in zip(at.hits_s[at.guesses :], at.fetches_s, strict=True):
            self._read(len(self._used), fetch_s, routed)
            self._hit(hit_s, self._disk)

    def _hit(self, seconds: float, there: float) -> None:
        self.cores = max(self.cores, there) + seconds
        self._used.append(self.cores)

    def _read(self, place: int, seconds: float, after: float = 0.0) -> None:
        """Into the slot of `place` in the ring, once what lay there is used."""
        free = self._used[place - self._slots] if place >= self._slots else 0.0
        self._disk = max(self._disk, after, free) + seconds
