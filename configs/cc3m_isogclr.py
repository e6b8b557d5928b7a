base = "cc3m.py"
algorithm = "isogclr"
gamma_min = 0.6  # the constant gamma; the figure is not in the released scripts: untuned
tau_init = 0.03  # these three from fastclip-v2 on CC3M; not published for iSogCLR
lr_tau = 0.0133
rho = 7.0
