base = "emoji.py"
algorithm = "sogclr"
tau_init = 0.05
gamma_min = 0.6  # the constant gamma
