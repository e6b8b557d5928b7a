base = "icons.py"
algorithm = "openclip"
