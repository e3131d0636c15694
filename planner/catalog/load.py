"""The built-in facts, and a user's own laid over them -> Catalog."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from moeplan.planner.catalog.machines import Gpu, Host, read_gpu, read_host, read_machine
from moeplan.planner.catalog.offers import OFFERS_FILE, merge_offers, read_offers
from moeplan.planner.catalog.yaml_tree import Entry, Fields, Problems, parse_yaml, plain, read_text
from moeplan.planner.diagnostics import CompileError, Span
from moeplan.planner.ir.machine import Machine, Offer
from moeplan.planner.ir.model import Model
from moeplan.planner.model_config import model_from_config

MODELS_FILE, GPUS_FILE, MACHINES_FILE = "models.yaml", "gpus.yaml", "machines.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """What is known. Mappings and offers are sorted by name.

    `sources` gives the citation and date behind each key that a `source` names.
    """

    models: Mapping[str, Model]
    gpus: Mapping[str, Gpu]
    machines: Mapping[str, Machine]
    offers: tuple[Offer, ...]
    sources: Mapping[str, str]


class LazyModels(Mapping[str, Model]):
    """Models by name, each computed from its configuration when first asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Model]]) -> None:
        self._makers = dict(sorted(makers.items()))
        self._made: dict[str, Model] = {}

    def __getitem__(self, name: str) -> Model:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def load_catalog(extra: Path | None, where: Span) -> Catalog:
    """The built-in catalog; where `extra` names a folder, its files replace and add entries.

    The folder may hold any of models.yaml, gpus.yaml, machines.yaml and offers.csv. Raises CompileError with
    every problem of its files at their places, or at `where` if the folder cannot be read.
    """
    if extra is None:
        return _built_in()
    problems = Problems()
    raw = _Raw.built_in().overlaid(_read_folder(extra, where, problems), problems)
    catalog = _build(raw, problems)
    offers = _own_offers(extra, where, problems, catalog)
    problems.raise_all()
    return Catalog(
        models=catalog.models,
        gpus=catalog.gpus,
        machines=catalog.machines,
        offers=merge_offers(catalog.offers, offers),
        sources=catalog.sources,
    )


def load_machine(path: Path, where: Span) -> Machine:
    """The machine that one file describes, as `moeplan calibrate` writes it.

    The file has the keys of an entry of machines.yaml and a `name`. GPUs and host families may be named
    from the built-in catalog. Raises CompileError at the places in the file, or at `where`.
    """
    problems = Problems()
    text = read_text(path, where, problems)
    entry = parse_yaml(text, str(path), problems) if text is not None else None
    problems.raise_all()
    assert entry is not None  # parse_yaml and read_text note a problem wherever they return None
    fields = Fields(entry, "machine", Problems())
    name = fields.text("name", path.stem)
    built_in = _built_in()
    machine = read_machine(name, entry, problems, built_in.sources, built_in.gpus, _Raw.built_in().hosts())
    problems.raise_all()
    return machine


@dataclass(frozen=True, slots=True)
class _Table:
    """One YAML file: the entries of its table, and its sources."""

    entries: Mapping[str, Entry]
    sources: Mapping[str, str]


_EMPTY = _Table({}, {})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Raw:
    """The entries of the four tables, not yet read; `own` names the models that the user gave."""

    models: _Table
    gpus: _Table
    machines: _Table
    host_entries: Mapping[str, Entry]
    own: frozenset[str] = frozenset()

    @staticmethod
    @cache
    def built_in() -> _Raw:
        """The entries of the files beside this module."""
        problems = Problems()
        raw = _raw(lambda name: _packaged(name, problems), problems)
        problems.raise_all()
        return raw

    def overlaid(self, other: _Raw, problems: Problems) -> _Raw:
        """Self with the entries of `other` laid over."""
        return _Raw(
            models=_overlay(self.models, other.models),
            gpus=_overlay(self.gpus, other.gpus),
            machines=_overlay(self.machines, other.machines),
            host_entries={**self.host_entries, **other.host_entries},
            own=frozenset(other.models.entries),
        )

    def sources(self) -> dict[str, str]:
        """All sources, sorted by key."""
        merged = {**self.models.sources, **self.gpus.sources, **self.machines.sources}
        return dict(sorted(merged.items()))

    def hosts(self, problems: Problems | None = None) -> dict[str, Host]:
        """Every host family."""
        noted = problems or Problems()
        sources = self.sources()
        return {name: read_host(name, e, noted, sources) for name, e in sorted(self.host_entries.items())}


def _overlay(below: _Table, above: _Table) -> _Table:
    return _Table({**below.entries, **above.entries}, {**below.sources, **above.sources})


def _raw(read: Callable[[str], Entry | None], problems: Problems) -> _Raw:
    machines, hosts = _table(read(MACHINES_FILE), "machines", problems)
    return _Raw(
        models=_table(read(MODELS_FILE), "models", problems)[0],
        gpus=_table(read(GPUS_FILE), "gpus", problems)[0],
        machines=machines,
        host_entries=hosts,
    )


def _table(entry: Entry | None, key: str, problems: Problems) -> tuple[_Table, Mapping[str, Entry]]:
    """The table under `key` with the file's sources, and the host families beside it, if any."""
    if entry is None:
        return _EMPTY, {}
    fields = Fields(entry, f"{key} file", problems)
    own = fields.group(key)
    hosts = fields.group("hosts") if key == "machines" else None
    sources = _sources(fields.group("sources"))
    fields.done()
    return _Table(dict(own.items()) if own else {}, sources), dict(hosts.items()) if hosts else {}


def _sources(group: Fields | None) -> dict[str, str]:
    """Citation and date of each source."""
    found: dict[str, str] = {}
    for key, entry in group.items() if group else ():
        source = Fields(entry, f"source {key}", group.problems) if group else None
        if source:
            found[key] = f"{source.text('citation')} ({source.text('date')})"
            source.done()
    return found


def _packaged(name: str, problems: Problems) -> Entry | None:
    text = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return parse_yaml(text, f"catalog/{name}", problems, built_in=True)


def _read_folder(folder: Path, where: Span, problems: Problems) -> _Raw:
    names = (MODELS_FILE, GPUS_FILE, MACHINES_FILE, OFFERS_FILE)
    try:
        present = {path.name for path in folder.iterdir()} & set(names)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        problems.add(where, f"{folder} cannot be read as a catalog folder: {reason}")
        problems.raise_all()
        raise AssertionError from error
    if not present:
        problems.add(where, f"{folder} holds no catalog file", f"expected any of: {', '.join(names)}")

    def read(name: str) -> Entry | None:
        if name not in present:
            return None
        text = read_text(folder / name, where, problems)
        return None if text is None else parse_yaml(text, str(folder / name), problems)

    return _raw(read, problems)


def _own_offers(folder: Path, where: Span, problems: Problems, catalog: Catalog) -> tuple[Offer, ...]:
    file = folder / OFFERS_FILE
    if not file.exists():
        return ()
    text = read_text(file, where, problems)
    return () if text is None else read_offers(text, str(file), problems, catalog.machines)


def _build(raw: _Raw, problems: Problems) -> Catalog:
    """The catalog of `raw` with the built-in offers."""
    sources = raw.sources()
    gpus = {name: read_gpu(name, e, problems, sources) for name, e in sorted(raw.gpus.entries.items())}
    hosts = raw.hosts(problems)
    machines = {
        name: read_machine(name, entry, problems, sources, gpus, hosts)
        for name, entry in sorted(raw.machines.entries.items())
    }
    return Catalog(
        models=_models(raw, problems),
        gpus=gpus,
        machines=machines,
        offers=_built_in_offers(),
        sources=sources,
    )


@cache
def _built_in() -> Catalog:
    problems = Problems()
    catalog = _build(_Raw.built_in(), problems)
    problems.raise_all()
    return catalog


@cache
def _built_in_offers() -> tuple[Offer, ...]:
    problems = Problems()
    text = files(__package__).joinpath(OFFERS_FILE).read_text(encoding="utf-8")
    offers = read_offers(text, f"catalog/{OFFERS_FILE}", problems, None)
    problems.raise_all()
    return offers


def _models(raw: _Raw, problems: Problems) -> LazyModels:
    """Every model; the user's own are computed at once, so that their problems show."""

    def maker(name: str, entry: Entry) -> Callable[[], Model]:
        return lambda: _model(name, entry, raw.models.sources)

    models = LazyModels({name: maker(name, entry) for name, entry in raw.models.entries.items()})
    for name in sorted(raw.own):
        try:
            models[name]
        except CompileError as error:
            problems.extend(error)
    return models


def _model(name: str, entry: Entry, sources: Mapping[str, str]) -> Model:
    problems = Problems()
    fields = Fields(entry, f"model {name}", problems, sources)
    source = fields.text("source")
    config = fields.group("config", required=True)
    fields.done()
    if source and source not in sources:
        fields.wrong("source", f"source '{source}' is not under 'sources'")
    problems.raise_all()
    assert config is not None
    return model_from_config({k: plain(e) for k, e in config.items()}, name, source, fields.place("config"))
