base = "laion315m.py"
algorithm = "openclip"  # tau learned at the model's lr and schedule
