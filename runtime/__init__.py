"""Keeps a run alive and visible: its life, failure detection, checkpoints, log, curves, plan.

Not here: the method. Researchers edit the files at the top level; nothing in this folder needs to be
read for that.
"""

import os

# On CPUs that this process shares with its data workers, a waiting thread of torch must not spin for
# long: it would hold a core that the one it waits for needs. torch reads this once, when it is loaded,
# so this package is imported before torch. It does not matter on a GPU.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
