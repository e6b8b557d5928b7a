base = "datacomp_small.py"
algorithm = "fastclip-v1"  # tau constant at 0.07, as in cc12m_v1.py
