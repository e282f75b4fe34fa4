"""Everything that the scripts share; see the map of the code in README.md."""

import os

# A thread of OpenMP that waits for the others keeps its core busy for a while before it sleeps. The 300,000 turns that
# GNU OpenMP takes by default make two runs on one machine wait for each other's waiting (docs/performance.md). It reads
# the number when torch is imported, and the scripts import utils before.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
