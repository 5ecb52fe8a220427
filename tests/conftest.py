"""One thread per process, and the repository root on the import path, before any test imports
torch."""

import os
import sys
from pathlib import Path

# Before torch is imported, and inherited by every subprocess: bit-for-bit comparisons need one
# number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads, and none waits for the hub

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
