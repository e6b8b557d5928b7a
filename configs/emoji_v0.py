base = "emoji.py"
algorithm = "fastclip-v0"
