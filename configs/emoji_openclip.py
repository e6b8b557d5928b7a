base = "emoji.py"
algorithm = "openclip"
