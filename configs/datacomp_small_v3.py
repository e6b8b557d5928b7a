base = "datacomp_small.py"
algorithm = "fastclip-v3"
rho = 8.5  # of cc12m_v3.py

# Adam moves ln(tau) by about lr_tau a step at most. From 0.07 to 0.03, where the threshold is, it
# must move by 0.85, for which cc12m_v3.py's 1e-4 would need 8,500 steps. Ten times that, in a tenth
# of the steps, suits this scale as 1e-4 suits the medium one. Untuned.
lr_tau = 1e-3
