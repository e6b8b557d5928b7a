base = "emoji.py"
algorithm = "isogclr"
tau_init = 0.05
lr_tau = 5e-3  # a sample is visited 24 times, so tau takes 24 steps
rho = 4.0
gamma_min = 0.6  # the constant gamma
