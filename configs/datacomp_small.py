# The small scale of DataComp's filtering track (arXiv 2304.14108). There only the data change; here
# the loss does, too. Its scale_configs.py fixes the model, the batch, the samples seen, the
# learning rate and its warm-up. The rest are open_clip's defaults: AdamW with weight decay 0.2,
# betas 0.9 and 0.98, epsilon 1e-6 (the defaults for a ViT here, too), a cosine to 0, crops of 0.9
# to 1 of the area. Two things differ: an epoch sees each sample once, while DataComp draws shards
# with replacement, and mixed precision is bfloat16 (precision = "auto"), there float16.

# The shards of a filtered pool, as DataComp's resharder writes them.
train_data = "data/datacomp_small/*.tar"
train_samples = 12_800_000  # for the plan only: the whole pool, as listed

model = "ViT-B-32"
batch_size = 4096
max_steps = 3_125  # 12.8 M samples seen, whatever the size of the filtered pool
epochs = 1000  # never reached
lr = 5e-4
lr_min = 0.0
warmup_steps = 500
weight_decay = 0.2
save_steps = 625  # five times, as DataComp does

# The rest belongs to the losses, carried over from the paper's runs and untuned here. rho of v3 was
# found with the released equations, on CC12M, whose model is this one; eps_u is from there, too.
equations = "release"
eps_u = 1e-14
tau_init = 0.07

# A filtered pool of 3.8 M pairs is passed 3.4 times, and gamma matters from the second visit of a
# sample on (so not at all in one pass over the unfiltered pool). gamma_decay_epochs stays at 0,
# half of the run, as 16 of 33 epochs are on CC12M: a number of epochs would suit one pool only.
# gamma_min is that of LAION315M. With CC12M's 0.2, four fifths of u at the third visit would come
# from the first two, when the model had learned little.
gamma_min = 0.8

# eval_data is left to you: docs/evaluating.md says how to evaluate on DataComp's sets.
