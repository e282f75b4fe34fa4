"""Everything that the scripts share; docs/extend.md is the map of the code."""

import os

# GNU OpenMP spins 300,000 times before a waiting thread sleeps. Two runs on one machine then take each other's cores
# (docs/performance.md). The number is read when torch is imported, so the scripts import utils before it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
