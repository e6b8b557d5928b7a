# The paper's xlarge scale, a subset of LAION-400M: arXiv 2407.01445, and the settings of the
# released scripts. Shards by img2dataset; of the list's 414,080,000 pairs 315,658,316 could be
# downloaded then.
train_data = "data/laion400m/{00000..41407}.tar"
train_samples = 315_658_316

model = "ViT-B-16"
batch_size = 5120
epochs = 42  # 13.3 B samples, as in the paper; the released script says 30
lr = 2e-4
lr_min = 4e-5
warmup_steps = 13_200
weight_decay = 0.2

# The published numbers, and rho, were made with the released equations (DEPARTURES in loss.py).
equations = "release"
eps_u = 1e-6
gamma_min = 0.8
gamma_decay_epochs = 10
tau_init = 0.07
save_steps = 5_000  # an epoch has 61,652 steps: too far apart to lose
seed = 2024
