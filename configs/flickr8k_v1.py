base = "flickr8k.py"
algorithm = "fastclip-v1"
tau_init = 0.1  # not tuned
