base = "cc12m.py"
algorithm = "openclip"  # tau learned at the model's lr and schedule
