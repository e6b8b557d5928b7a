"""Keeps a run alive and visible: a job's life, failure detection, checkpoints, log, curves, plan.

The method is not here. Researchers edit the files at the top level, and need nothing of this folder
for that.
"""

import os

# On CPUs that this process shares with its data workers, a waiting thread of torch must not spin
# for long: it would hold a core that the one it waits for needs. torch reads this once, when it is
# loaded, so this package is imported before torch. It does not matter on a GPU.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

# The process that started this one, torchrun for example. It is asked for here, before torch is
# loaded: a torchrun that dies during those seconds must be noticed, too.
PARENT = os.getppid()
