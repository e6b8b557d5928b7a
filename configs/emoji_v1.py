base = "emoji.py"
algorithm = "fastclip-v1"
tau_init = 0.05
