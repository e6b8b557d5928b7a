# CC12M as the paper's large scale: arXiv 2407.01445, and the settings of the released scripts.
# Shards by img2dataset; of 12,423,374 pairs in the list 9,187,328 could be downloaded then.
train_data = "data/cc12m/{00000..01242}.tar"
train_samples = 9_187_328

model = "ViT-B-32"
batch_size = 2048
epochs = 33
lr = 4e-4
lr_min = 0.0
warmup_steps = 10_000
weight_decay = 0.1

# The published numbers, and rho, were made with the released equations (DEPARTURES in loss.py).
equations = "release"
eps_u = 1e-14
gamma_min = 0.2
gamma_decay_epochs = 16
tau_init = 0.07
seed = 2024
