base = "cc12m.py"
algorithm = "fastclip-v1"  # tau constant at 0.07, as in the released script
