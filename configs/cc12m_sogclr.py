base = "cc12m.py"
algorithm = "sogclr"  # tau constant
gamma_min = 0.6  # the constant gamma; the figure is not in the released scripts: untuned
