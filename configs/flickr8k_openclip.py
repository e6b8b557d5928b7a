base = "flickr8k.py"
algorithm = "openclip"
