# The icons set (python -m tools.prepare icons): over 150 icon sets to train on, ten others, unseen,
# to evaluate. The model is that of the emoji set, wider. Nothing here is tuned: the numbers follow
# the emoji set's. Settings are to be chosen on data/icons/val, not on the tests.
train_data = "data/icons/train/*.tar"
eval_data = {
    "carbon": "data/icons/test/carbon/*.tar",
    "fa7-solid": "data/icons/test/fa7-solid/*.tar",
    "fluent-emoji-flat": "data/icons/test/fluent-emoji-flat/*.tar",
    "game-icons": "data/icons/test/game-icons/*.tar",
    "healthicons": "data/icons/test/healthicons/*.tar",
    "lucide": "data/icons/test/lucide/*.tar",
    "noto": "data/icons/test/noto/*.tar",
    "tabler": "data/icons/test/tabler/*.tar",
    "twemoji": "data/icons/test/twemoji/*.tar",
    "vscode-icons": "data/icons/test/vscode-icons/*.tar",
}

model = "RN50"  # only its architecture: the numbers below replace its own
image_size = 32
vision_layers = (1, 1, 1, 1)
vision_width = 32
embed_dim = 256
context_length = 32
text_width = 256
text_heads = 4
text_layers = 2

batch_size = 256
lanes = 32  # the set has 57 shards
epochs = 6
lr = 1e-3
warmup_steps = 500
weight_decay = 0.1

eps_u = 1e-3
gamma_min = 0.5  # a sample is visited six times, so u must follow fast
eval_steps = 2064  # every two epochs
save_steps = 1032
