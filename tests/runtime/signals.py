"""The runtime's command line as a process of its own that sends itself signals at one moment of its work."""

import subprocess
import sys
from signal import Signals

_PROGRAM = """
import signal, sys
from contextlib import suppress
from moeplan.runtime_min import __main__ as command, results
add = results.Results.add

def adding(self, record):
    add(self, record)
    if len(self.done) == {when}:
        for number in {numbers}:
            with suppress(KeyboardInterrupt):
                signal.raise_signal(number)
        raise KeyboardInterrupt

results.Results.add = adding
sys.exit(command.main({argv}))
"""


def signalled(argv: list[str], when: int, *numbers: Signals) -> subprocess.CompletedProcess[str]:
    """Run `argv`; once `when` requests are done `numbers` come, however fast the machine."""
    program = _PROGRAM.format(argv=argv, when=when, numbers=[int(number) for number in numbers])
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
