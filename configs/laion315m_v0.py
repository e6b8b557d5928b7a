base = "laion315m.py"
algorithm = "fastclip-v0"  # tau learned at the model's lr and schedule
