# The medium scale of DataComp: ten times the pool and the samples seen of the small one.
base = "datacomp_small.py"

train_data = "data/datacomp_medium/*.tar"
train_samples = 128_000_000  # for the plan only: the whole pool, as listed

max_steps = 31_250  # 128 M samples seen
save_steps = 6_250  # five times, as DataComp does
