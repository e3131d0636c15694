"""Plan -> compose.yaml: the replicas of machines that the user owns, for docker compose on one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeplan.codegen.groups import PORT, engine_image, grace_s, serve_arguments
from moeplan.codegen.packing import packing_of, quantize_command
from moeplan.codegen.render import expanded_scalar, render
from moeplan.planner.ir.placement import Site
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import Policy

_INPUT, _OUTPUT = "/requests/input.jsonl", "/requests/output.jsonl"
_MODEL = ("MODEL", "what vLLM loads, a Hugging Face name")
_IMAGE = ("MOEPLAN_IMAGE", "an image with `moeplan[runtime]` installed")
_CHECKPOINT = ("CHECKPOINT", "the folder of the checkpoint")
_PACKED = "CHECKPOINT_{}", "the folder that `{}` writes"
_REQUESTS = ("REQUESTS", "a folder with input.jsonl (OpenAI batch format), where output.jsonl will be")


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A mount. `source` is YAML already: it may name a setting."""

    type: str
    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One container. `image` and the words of `command` are YAML already; no `port`: it ends by itself."""

    column: str
    image: str
    entrypoint: str
    command: tuple[str, ...]
    volumes: tuple[Volume, ...]
    port: int
    grace_s: int
    gpus: int
    rehearsed_only: bool
    settings: tuple[tuple[str, str], ...]


def emit(plan: Plan) -> dict[str, str]:
    """Return one file with every replica on owned machines; nothing where all are rented.

    Every machine gets the same file: several replicas of one column are several machines.
    """
    services = [
        _service(plan, choice.column.policy, site)
        for choice, site in zip(plan.fleet.choices, plan.placement.sites, strict=True)
        if site.market == "owned"
    ]
    if not services:
        return {}
    settings = sorted({setting for service in services for setting in service.settings})
    text = render("compose/compose.yaml.j2", name=plan.spec.name, services=services, settings=settings)
    return {"compose.yaml": text}


def _service(plan: Plan, policy: Policy, site: Site) -> Service:
    if policy.engine == "runtime_min":
        return _runtime(policy, site)
    cache = Volume(type="volume", source="cache", target="/cache")
    online = site.serves == "online"
    words = ["serve"] if online else ["run-batch", "-i", _INPUT, "-o", _OUTPUT, "--model"]
    return Service(
        column=site.column,
        image=expanded_scalar(engine_image(plan)),
        entrypoint="vllm",
        command=(*_words(words), _setting(_MODEL), *_words(serve_arguments(plan, policy))),
        volumes=(cache,) if online else (cache, _bound(_REQUESTS, "/requests")),
        port=PORT if online else 0,
        grace_s=grace_s(site),
        gpus=policy.gpus * policy.data_parallel,
        rehearsed_only=policy.rehearsed_only,
        settings=(_MODEL,) if online else (_MODEL, _REQUESTS),
    )


def _runtime(policy: Policy, site: Site) -> Service:
    checkpoint = _packed(policy) if packing_of(policy) else _CHECKPOINT
    words = ["runtime_min", "run", f"/plan/runtime/{site.column}", "--checkpoint", "/checkpoint"]
    return Service(
        column=site.column,
        image=_setting(_IMAGE),
        entrypoint="",
        command=_words([*words, "--input", _INPUT, "--output", _OUTPUT]),
        volumes=(
            Volume(type="bind", source=".", target="/plan", read_only=True),
            _bound(checkpoint, "/checkpoint", read_only=True),
            _bound(_REQUESTS, "/requests"),
            Volume(type="volume", source="cache", target="/cache"),
        ),
        port=0,
        grace_s=0,
        gpus=policy.gpus * policy.data_parallel,
        rehearsed_only=policy.rehearsed_only,
        settings=(_IMAGE, checkpoint, _REQUESTS),
    )


def _packed(policy: Policy) -> tuple[str, str]:
    """The setting that names a packed checkpoint, with the command that makes it."""
    name, meaning = _PACKED
    command = quantize_command(_CHECKPOINT[0], policy)
    return name.format(packing_of(policy).upper()), meaning.format(command)


def _words(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(expanded_scalar(word) for word in words)


def _bound(setting: tuple[str, str], target: str, read_only: bool = False) -> Volume:
    return Volume(type="bind", source=_setting(setting), target=target, read_only=read_only)


def _setting(setting: tuple[str, str]) -> str:
    """The value of an environment variable; compose stops where it is not set."""
    return f'"${{{setting[0]}:?set it, see the head of this file}}"'
