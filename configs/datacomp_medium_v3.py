base = "datacomp_medium.py"
algorithm = "fastclip-v3"
rho = 8.5  # these two from cc12m_v3.py
lr_tau = 1e-4
