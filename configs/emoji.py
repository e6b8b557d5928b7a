# The emoji set (python -m tools.prepare emoji): five drawing styles to train on, a sixth, unseen,
# to evaluate. Sized for two CPU cores: a narrow ResNet at 32 px learns faster per second there than
# at 64 px, and better with BatchNorm than with GroupNorm.
train_data = "data/emoji/train/*.tar"
eval_data = "data/emoji/test/*.tar"

model = "RN50"  # only its architecture: the numbers below replace its own
image_size = 32
vision_layers = (1, 1, 1, 1)
vision_width = 16
embed_dim = 128
context_length = 32
text_width = 128
text_heads = 4
text_layers = 1

batch_size = 64  # small: where a global loss should pay
lanes = 16  # the set has 15 shards, and each further lane reads once more through one per epoch
epochs = 24
lr = 1e-3
warmup_steps = 400
weight_decay = 0.1

eps_u = 1e-3
gamma_min = 0.3  # a short run needs it large
eval_steps = 1398  # every six epochs
save_steps = 1398
