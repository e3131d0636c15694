"""`moeplan` as a process of its own, without waiting for its imports each time.

One process imports what the commands import and then forks for each: a fresh interpreter's state but for
loaded modules, real files as streams, a real exit code. What a command imports is tested elsewhere, in
interpreters of its own.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PLAIN = "NUMBA_DISABLE_JIT"
_ALONE = "import sys; sys.argv[0] = 'moeplan'; from moeplan.planner.cli import main; main()"
_SERVER = """
import gc, json, os, sys
import matplotlib.backends.backend_svg, matplotlib.figure, numba, numpy, pulp
import moeplan.codegen.emit.report_html, moeplan.codegen.write, moeplan.planner.explain.explain
import moeplan.planner.passes.schedule, moeplan.planner.pipeline, moeplan.planner.replay
import moeplan.planner.simulate.fleet, moeplan.planner.spot_simulation
from moeplan.planner.cli import main

def run(job):
    for number, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_RDWR), number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = ["moeplan", *job["arguments"]]
    sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w", closefd=False) for n in range(3))
    code = 70
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

gc.freeze()
for line in sys.stdin:
    if (child := os.fork()) == 0:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends when its standard input does, with the process of the tests."""
    command = [sys.executable, "-c", _SERVER]
    pipe, env = subprocess.PIPE, {k: v for k, v in os.environ.items() if k != _PLAIN}
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
    atexit.register(server.communicate)
    return server


@contextmanager
def plain_children() -> Iterator[None]:
    """Processes that begin meanwhile run what Numba would compile as plain Python; this one does not."""
    os.environ[_PLAIN] = "1"
    try:
        yield
    finally:
        del os.environ[_PLAIN]
        if config := sys.modules.get("numba.core.config"):  # which may have seen it
            config.reload_config()


def moeplan(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command line; it may fail, but not with a traceback.

    What runs a model does so in an interpreter of its own: torch and Numba stay apart.
    """
    words = [str(argument) for argument in arguments]
    if words[0] == "run" or (words[0] == "calibrate" and "--from" not in words):
        command = [sys.executable, "-c", _ALONE, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
        assert "Traceback" not in done.stderr, done.stderr
        return done
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        job = {"arguments": words, "cwd": str(cwd or Path.cwd()), "out": out.name, "err": err.name}
        print(json.dumps({**job, "env": dict(os.environ)}), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        told, errors = out.read().decode(), err.read().decode()
    assert "Traceback" not in errors, errors
    return subprocess.CompletedProcess(["moeplan", *words], code, told, errors)
