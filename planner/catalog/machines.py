"""Entries of gpus.yaml and machines.yaml -> Gpu and Machine.

The three ways to give a figure, strongest first: in the entry itself, in the GPU it names, in the host family
it names. A family's figures are per physical core, so that one estimate serves every size of a type.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from moeplan.planner.catalog.yaml_tree import Entry, Fields, Problems
from moeplan.planner.ir.machine import COMPUTE_KEPT, DISK_KEPT, Kernels, Level, Machine, Provenance, Table
from moeplan.planner.ir.model import PACKED_BYTES

DTYPES = ("bf16", "fp16", "float32", "fp8", "int8", "fp4")
_PROVENANCES: tuple[Provenance, ...] = ("datasheet", "analytic", "calibrated", "measured")
_ACHIEVED = ("calibrated", "measured")

# Relative standard error of a prediction, by where the figures come from: with these, 95 % and 84 % of
# measured serving runs lie in the 90 % interval, before and after calibration (docs/accuracy.md).
SIGMA: dict[str, float] = {"datasheet": 0.30, "analytic": 0.40, "calibrated": 0.18, "measured": 0.15}

# On machines without a GPU: with the figures of the runtime's operators, and without (benchmarks/
# runtime_accuracy.py: 90 % of the errors of many small models within this interval).
_SIGMA_KERNELS, _SIGMA_NO_KERNELS = 0.15, 0.30

# Efficiencies where nothing better is known. The first four: fitted to measured serving runs of ten models on
# six GPU types, with vLLM's fixed costs (benchmarks/serving_accuracy.py, docs/accuracy.md). Prefill on
# A100 and V100: 0.68-0.81. Pinned copies over PCIe: 0.70-0.82 of nominal. CPU attention reads at half of the
# host's nominal bandwidth; CPU products as the linear operators in microsoft/vidur's profiles (0.732).
MEMORY_EFFICIENCY = 0.84
EXPERT_MEMORY_EFFICIENCY = 0.71
ATTENTION_MEMORY_EFFICIENCY = 0.91
COMPUTE_EFFICIENCY = 0.62
HOST_COMPUTE_EFFICIENCY = 0.732
PREFILL_EFFICIENCY = 0.72
LINK_EFFICIENCY = 0.75
HOST_MEMORY_EFFICIENCY = 0.5
OFFLOAD_PREFILL_EFFICIENCY = 0.3

_CPU_LAUNCH_S = 5.0e-6
_GPU_LAUNCH_S = 3.0e-6

_BYTES = 1e16
_RATE = (1e6, 1e15)
_FLOPS = (1e6, 1e19)
_SHARE = (1e-3, 1.0)
_SECONDS = (1e-12, 1.0)
# Of a kernel: calibrated as a difference of two times, so on a busy machine far from any true rate.
_KERNEL_RATE = (1e3, 1e19)
_MOST_ROWS = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU: nominal rates and the share of each that kernels reach.

    `offload_prefill_efficiency` is the share of the peak that prefill reaches while weights stream in from
    the host. `sources` names the source of each figure.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    host_link_bytes_per_s: float
    peer_bytes_per_s: float
    launch_s: float
    memory_efficiency: float
    expert_memory_efficiency: float
    attention_memory_efficiency: float
    compute_efficiency: float
    prefill_efficiency: float
    offload_prefill_efficiency: float
    link_efficiency: float
    sources: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A family of hosts, rates per physical core; the totals end at those of the whole server."""

    name: str
    threads_per_core: int
    flops_per_s_per_core: Mapping[str, float]
    dram_bytes_per_s_per_core: float
    dram_bytes_per_s_most: float
    disk_bytes: int
    disk_bytes_per_s: float
    source: str


def read_gpu(name: str, entry: Entry, problems: Problems, sources: Collection[str]) -> Gpu:
    """The GPU that an entry of gpus.yaml gives in full."""
    fields = Fields(entry, f"gpu {name}", problems, sources)
    gpu = _gpu(fields, name, None, achieved=False)
    fields.done()
    return gpu


def _gpu(fields: Fields, name: str, base: Gpu | None, achieved: bool) -> Gpu:
    """The GPU of `fields`, every figure left out taken from `base`."""
    flops = fields.group("flops_per_s", required=base is None)
    size = base.memory_bytes if base and "memory_bytes" not in fields else None
    known = _KnownGpu(fields, base, achieved)
    gpu = Gpu(
        name=name,
        memory_bytes=size or fields.bytes("memory_bytes", _BYTES),
        memory_bytes_per_s=known.rate("memory_bytes_per_s"),
        flops_per_s=base.flops_per_s if base and flops is None else _flops(flops),
        host_link_bytes_per_s=known.rate("host_link_bytes_per_s"),
        peer_bytes_per_s=known.rate("peer_bytes_per_s"),
        launch_s=fields.figure("launch_s", 0.0, 1.0, base.launch_s if base else _GPU_LAUNCH_S),
        memory_efficiency=known.share("memory_efficiency", "memory_bytes_per_s", MEMORY_EFFICIENCY),
        expert_memory_efficiency=known.share(
            "expert_memory_efficiency", "memory_bytes_per_s", EXPERT_MEMORY_EFFICIENCY
        ),
        attention_memory_efficiency=known.share(
            "attention_memory_efficiency", "memory_bytes_per_s", ATTENTION_MEMORY_EFFICIENCY
        ),
        compute_efficiency=known.share("compute_efficiency", "flops_per_s", COMPUTE_EFFICIENCY),
        prefill_efficiency=known.share("prefill_efficiency", "flops_per_s", PREFILL_EFFICIENCY),
        offload_prefill_efficiency=known.share(
            "offload_prefill_efficiency", "flops_per_s", OFFLOAD_PREFILL_EFFICIENCY
        ),
        link_efficiency=known.share("link_efficiency", "host_link_bytes_per_s", LINK_EFFICIENCY),
        sources={**(base.sources if base else {}), **fields.figure_sources, **_flops_sources(flops)},
    )
    if gpu.host_link_bytes_per_s > gpu.memory_bytes_per_s:
        fields.wrong("host_link_bytes_per_s", "the host link is faster than the memory it feeds")
    return gpu


@dataclass(frozen=True, slots=True)
class _KnownGpu:
    """Reads figures of a GPU that may be known already."""

    fields: Fields
    base: Gpu | None
    achieved: bool

    def rate(self, key: str) -> float:
        """A rate, from the base where it is left out."""
        return self.fields.figure(key, *_RATE, getattr(self.base, key) if self.base else None)

    def share(self, key: str, of: str, default: float) -> float:
        """The share of rate `of` that is reached: all of a rate that was itself achieved, not nominal."""
        if self.achieved and of in self.fields:
            default = 1.0
        elif self.base:
            default = getattr(self.base, key)
        return self.fields.figure(key, *_SHARE, default)


def _flops(fields: Fields | None) -> Mapping[str, float]:
    """Dense peaks by dtype, in the order of DTYPES."""
    if fields is None:
        return {}
    flops = {dtype: fields.figure(dtype, *_FLOPS) for dtype in DTYPES if dtype in fields}
    fields.done(known=DTYPES)
    if not flops:
        fields.problems.add(fields.span, f"{fields.name}: no dtype given", f"one of: {', '.join(DTYPES)}")
    return flops


def _flops_sources(fields: Fields | None) -> dict[str, str]:
    return {f"flops_per_s.{k}": v for k, v in fields.figure_sources.items()} if fields else {}


def read_host(name: str, entry: Entry, problems: Problems, sources: Collection[str]) -> Host:
    """The host family that an entry under `hosts` of machines.yaml gives."""
    fields = Fields(entry, f"host {name}", problems, sources)
    flops = fields.group("flops_per_s_per_core", required=True)
    per_core = fields.figure("dram_bytes_per_s_per_core", *_RATE)
    host = Host(
        name=name,
        threads_per_core=fields.count("threads_per_core", 8),
        flops_per_s_per_core=_flops(flops),
        dram_bytes_per_s_per_core=per_core,
        dram_bytes_per_s_most=fields.figure("dram_bytes_per_s_most", *_RATE),
        disk_bytes=fields.bytes("disk_bytes", _BYTES),
        disk_bytes_per_s=fields.figure("disk_bytes_per_s", *_RATE),
        source=_joined(fields, flops),
    )
    fields.done()
    return host


def _joined(*groups: Fields | None) -> str:
    """The distinct sources of the figures of some groups, in the order met."""
    return ", ".join(dict.fromkeys(s for g in groups if g for s in g.figure_sources.values()))


def read_machine(
    name: str,
    entry: Entry,
    problems: Problems,
    sources: Collection[str],
    gpus: Mapping[str, Gpu],
    hosts: Mapping[str, Host],
) -> Machine:
    """The machine that an entry of machines.yaml, or a machine file, gives."""
    fields = Fields(entry, f"machine {name}", problems, sources)
    fields.text("name", name)
    host = _host(fields, hosts)
    provenance = fields.text("provenance", "datasheet" if host else None, _PROVENANCES)
    achieved = provenance in _ACHIEVED
    cpu = fields.group("cpu", required=True)
    dram = fields.group("dram", required=True)
    disk = fields.group("disk", required=host is None)
    gpu, count, gpu_fields = _machine_gpu(fields, gpus, achieved)
    cores = _cores(cpu, host)
    parts = _Parts(host=host, cores=cores, achieved=achieved)
    dram_level = parts.dram(cpu, dram, gpu)
    disk_level = parts.disk(disk)
    levels = (dram_level, disk_level) if gpu is None else (_gpu_level(gpu), dram_level, disk_level)
    launch_s = cpu.figure("launch_s", 0.0, 1.0, _CPU_LAUNCH_S) if cpu else _CPU_LAUNCH_S
    kernels = _kernels(cpu, cores)
    machine = Machine(
        name=name,
        gpu=gpu.name if gpu else "",
        gpus=count,
        cpu_cores=cores,
        levels=levels,
        peer_bytes_per_s=gpu.peer_bytes_per_s if gpu else 0.0,
        launch_s=gpu.launch_s if gpu else launch_s,
        provenance=_provenance(provenance),
        sigma=fields.figure("sigma", 0.0, 10.0, _sigma(provenance, bool(gpu), bool(kernels))),
        source=_machine_source(fields, sources, host, gpu),
        kernels=kernels,
        compute_kept=cpu.figure("while_reading", *_SHARE, COMPUTE_KEPT) if cpu else COMPUTE_KEPT,
        disk_kept=disk.figure("while_computing", *_SHARE, DISK_KEPT) if disk else DISK_KEPT,
        disk_sigma=disk.figure("sigma", 0.0, 10.0, 0.0) if disk else 0.0,
    )
    if disk_level.bytes_per_s > dram_level.bytes_per_s:
        where = disk if disk and "bytes_per_s" in disk else fields
        where.wrong("bytes_per_s", "the disk is faster than the memory it feeds")
    for group in (cpu, dram, disk, gpu_fields, fields):
        if group:
            group.done()
    return machine


def _sigma(provenance: str, gpu: bool, kernels: bool) -> float:
    """Relative standard error of predictions, the wider where the runtime's operators were not measured."""
    if gpu or provenance not in _ACHIEVED:
        return SIGMA.get(provenance, 0.4)
    return _SIGMA_KERNELS if kernels else _SIGMA_NO_KERNELS


def _kernels(cpu: Fields | None, cores: float) -> tuple[Kernels, ...]:
    """Figures of the bundled runtime's operators: `kernels: {DTYPE: {THREADS: {figures}}}`."""
    group = cpu.group("kernels") if cpu else None
    if group is None:
        return ()
    found = []
    for dtype in [dtype for dtype in DTYPES if dtype in group]:
        by_threads = group.group(dtype, required=True)
        for text in by_threads.keys if by_threads else ():
            figures = by_threads.group(text) if by_threads else None
            threads = int(text) if text.isdecimal() else 0
            if not 1 <= threads <= max(1.0, cores) and by_threads:
                by_threads.wrong(text, f"'{text}' is no number of threads", f"1 to the {cores:g} cores")
            elif figures:
                found.append(_one_kernels(figures, dtype, threads))
        if by_threads:
            by_threads.done()
    group.done(known=DTYPES)
    return tuple(sorted(found, key=lambda k: (DTYPES.index(k.dtype), k.threads)))


def _one_kernels(fields: Fields, dtype: str, threads: int) -> Kernels:
    kernels = Kernels(
        threads=threads,
        dtype=dtype,
        attention_s=fields.figure("attention_s", *_SECONDS),
        route_s=fields.figure("route_s", *_SECONDS),
        expert_s=fields.figure("expert_s", *_SECONDS),
        row_s=fields.figure("row_s", *_SECONDS),
        pass_s=fields.figure("pass_s", *_SECONDS),
        sequence_s=fields.figure("sequence_s", *_SECONDS),
        product_flops_per_s=_table(fields, "product_flops_per_s", _KERNEL_RATE),
        far_bytes_per_s=_table(fields, "far_bytes_per_s", _KERNEL_RATE),
        attention_flops_per_s=_table(fields, "attention_flops_per_s", _KERNEL_RATE),
        kv_bytes_per_s=fields.figure("kv_bytes_per_s", *_KERNEL_RATE),
        head_s=fields.figure("head_s", *_SECONDS),
        attention_values_per_s=_table(fields, "attention_values_per_s", _KERNEL_RATE),
        decode_values_per_s=_table(fields, "decode_values_per_s", _KERNEL_RATE),
        route_values_per_s=_table(fields, "route_values_per_s", _KERNEL_RATE),
        expert_values_per_s=_table(fields, "expert_values_per_s", _KERNEL_RATE),
        score_values_per_s=fields.figure("score_values_per_s", *_KERNEL_RATE),
        decode_s=_table(fields, "decode_s", _SECONDS) if "decode_s" in fields else (),
        unpack_values_per_s=_unpacking(fields),
    )
    fields.done()
    return kernels


def _unpacking(fields: Fields) -> tuple[tuple[str, float], ...]:
    """Values per second by packing, where they were measured."""
    group = fields.group("unpack_values_per_s")
    if group is None:
        return ()
    rates = tuple((name, group.figure(name, *_KERNEL_RATE)) for name in PACKED_BYTES if name in group)
    group.done(known=tuple(PACKED_BYTES))
    return rates


def _table(fields: Fields, key: str, bounds: tuple[float, float]) -> Table:
    """Rates by number of rows or tokens, ascending."""
    group = fields.group(key, required=True)
    if group is None:
        return ((1, bounds[0]),)
    found = {}
    for text in group.keys:
        if text.isdecimal() and 1 <= int(text) <= _MOST_ROWS:
            found[int(text)] = group.figure(text, *bounds)
        else:
            group.wrong(text, f"'{text}' is no number of rows", f"a whole number from 1 to {_MOST_ROWS}")
    if not found:
        fields.wrong(key, f"'{key}' holds no figure", "numbers of rows, each with a rate, as in {1: 2.0e+10}")
    return tuple(sorted(found.items())) or ((1, bounds[0]),)


def _provenance(text: str) -> Provenance:
    return next((p for p in _PROVENANCES if p == text), "datasheet")


def _host(fields: Fields, hosts: Mapping[str, Host]) -> Host | None:
    name = fields.text("host", "")
    if name and name not in hosts:
        fields.wrong("host", f"unknown host family '{name}'", f"known families: {', '.join(sorted(hosts))}")
    return hosts.get(name)


def _machine_gpu(
    fields: Fields, gpus: Mapping[str, Gpu], achieved: bool
) -> tuple[Gpu | None, int, Fields | None]:
    """The GPU of a machine (known by name, given inline, or both), how many, and its keys."""
    group = fields.group("gpu")
    if group is None:
        return None, 0, None
    name = group.text("name")
    if name and name not in gpus and "memory_bytes" not in group:
        known = f"known GPUs: {', '.join(sorted(gpus))}; or give its figures here"
        group.wrong("name", f"unknown GPU '{name}'", known)
        return None, 0, None
    count = group.count("count", 64, 1)
    return _gpu(group, name, gpus.get(name), achieved), count, group


def _gpu_level(gpu: Gpu) -> Level:
    return Level(
        name="gpu",
        bytes=gpu.memory_bytes,
        bytes_per_s=gpu.memory_bytes_per_s,
        flops_per_s=gpu.flops_per_s,
        up_bytes_per_s=0.0,
        memory_efficiency=gpu.memory_efficiency,
        expert_memory_efficiency=gpu.expert_memory_efficiency,
        attention_memory_efficiency=gpu.attention_memory_efficiency,
        compute_efficiency=gpu.compute_efficiency,
        prefill_efficiency=gpu.prefill_efficiency,
        up_efficiency=1.0,
        offload_prefill_efficiency=gpu.offload_prefill_efficiency,
    )


def _cores(cpu: Fields | None, host: Host | None) -> float:
    """Physical cores: given, or vCPUs over the family's threads per core."""
    if cpu is None:
        return 1.0
    if host and "vcpus" in cpu:
        return cpu.count("vcpus", 4096) / host.threads_per_core
    return cpu.figure("cores", 0.5, 4096.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """Builds the host side of a machine."""

    host: Host | None
    cores: float
    achieved: bool

    def dram(self, cpu: Fields | None, dram: Fields | None, gpu: Gpu | None) -> Level:
        """DRAM, the cores that work out of it, and the link up to the GPU where there is one."""
        reached = self._share(dram, "efficiency", HOST_MEMORY_EFFICIENCY)
        return Level(
            name="dram",
            bytes=dram.bytes("bytes", _BYTES) if dram else 1,
            bytes_per_s=dram.figure("bytes_per_s", *_RATE, self._dram_bytes_per_s()) if dram else 1.0,
            flops_per_s=self._cpu_flops(cpu),
            up_bytes_per_s=gpu.host_link_bytes_per_s if gpu else 0.0,
            memory_efficiency=reached,
            expert_memory_efficiency=reached,
            attention_memory_efficiency=reached,
            compute_efficiency=self._share(cpu, "compute_efficiency", HOST_COMPUTE_EFFICIENCY),
            prefill_efficiency=self._share(cpu, "prefill_efficiency", PREFILL_EFFICIENCY),
            up_efficiency=gpu.link_efficiency if gpu else 1.0,
        )

    def disk(self, disk: Fields | None) -> Level:
        """The disk, read at its own rate. Rates of disks are given as reached, so nothing is taken off."""
        rate = self.host.disk_bytes_per_s if self.host else None
        size = self.host.disk_bytes if self.host else 1
        if disk is not None:
            rate = disk.figure("bytes_per_s", *_RATE, rate)
            size = disk.bytes("bytes", _BYTES) if self.host is None or "bytes" in disk else size
        efficiency = disk.figure("efficiency", *_SHARE, 1.0) if disk else 1.0
        return Level(
            name="disk",
            bytes=size,
            bytes_per_s=rate or 1.0,
            flops_per_s={},
            up_bytes_per_s=rate or 1.0,
            memory_efficiency=efficiency,
            expert_memory_efficiency=efficiency,
            attention_memory_efficiency=efficiency,
            compute_efficiency=1.0,
            prefill_efficiency=1.0,
            up_efficiency=efficiency,
        )

    def _dram_bytes_per_s(self) -> float | None:
        if self.host is None:
            return None
        return min(self.cores * self.host.dram_bytes_per_s_per_core, self.host.dram_bytes_per_s_most)

    def _cpu_flops(self, cpu: Fields | None) -> Mapping[str, float]:
        given = cpu.group("flops_per_s", required=self.host is None) if cpu else None
        if given is not None:
            return _flops(given)
        if self.host is None:
            return {}
        return {dtype: self.cores * rate for dtype, rate in self.host.flops_per_s_per_core.items()}

    def _share(self, group: Fields | None, key: str, known: float) -> float:
        default = 1.0 if self.achieved else known
        return group.figure(key, *_SHARE, default) if group else default


def _machine_source(fields: Fields, sources: Collection[str], host: Host | None, gpu: Gpu | None) -> str:
    """The entry's own source and those of the figures it inherits, each once."""
    own = fields.text("source", "")
    if host and own and own not in sources:
        fields.wrong("source", f"source '{own}' is not under 'sources'")
    inherited = host.source.split(", ") if host else []
    names = [own or "", *inherited, *(gpu.sources.values() if gpu else ())]
    # The file's name alone: the same file makes the same plan wherever it lies.
    return ", ".join(dict.fromkeys(name for name in names if name)) or Path(fields.span.path).name
