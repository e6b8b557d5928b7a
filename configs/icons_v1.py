base = "icons.py"
algorithm = "fastclip-v1"
tau_init = 0.1  # not tuned here; on the emoji set better than 0.05
