base = "datacomp_medium.py"
algorithm = "openclip"  # DataComp's own loss; tau learned at the model's lr and schedule
