base = "emoji.py"
algorithm = "sogclr"
tau_init = 0.1  # as in emoji_v1.py; not tuned
gamma_min = 0.6  # the constant gamma
