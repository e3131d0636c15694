"""The bundled runtime: a plan folder and a checkpoint in, tokens out."""

from moeplan.runtime_min.cpu import cap_onednn

# Here, since it has to happen before torch is imported, whichever module is used first.
cap_onednn()
