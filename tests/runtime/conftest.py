"""The runtime's own trap avoidance has to run before any test imports torch."""

import moeplan.runtime_min  # noqa: F401
