# CC3M as the paper's medium scale: arXiv 2407.01445, and the settings of the released scripts.
# Shards by img2dataset; of 3,318,333 pairs in the list 2,723,840 could be downloaded then.
train_data = "data/cc3m/{00000..00331}.tar"
train_samples = 2_723_840

model = "RN50"
batch_size = 1024
epochs = 37
lr = 1e-3
lr_min = 0.0
warmup_steps = 10_000
weight_decay = 0.1

# The published numbers, and rho, were made with the released equations (DEPARTURES in loss.py).
equations = "release"
eps_u = 1e-14
gamma_min = 0.2
gamma_decay_epochs = 18
tau_init = 0.07
seed = 2024
