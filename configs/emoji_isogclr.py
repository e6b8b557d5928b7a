base = "emoji.py"
algorithm = "isogclr"
tau_init = 0.1  # where it starts; as in emoji_v1.py, not tuned
lr_tau = 5e-3  # a sample is visited 24 times, so tau takes 24 steps
rho = 3.1  # as in emoji_v3.py; not tuned
gamma_min = 0.6  # the constant gamma
