base = "emoji.py"
algorithm = "fastclip-v1"
tau_init = 0.1  # better than 0.07 and 0.14 on a held-out style (experiments/tune_batch_size.py)
