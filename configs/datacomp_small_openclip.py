base = "datacomp_small.py"
algorithm = "openclip"  # DataComp's own loss; tau learned at the model's lr and schedule
