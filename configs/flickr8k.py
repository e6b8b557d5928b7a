# Flickr8k, which you bring (python -m tools.flickr8k SOURCE): photographs with five captions each,
# one of which is drawn per epoch; the test is retrieval. Sized for two CPU cores, as the emoji set
# is, at 64 px, where a photograph can still be read. None of the settings is tuned yet: do that
# with --eval_data='data/flickr8k/val/*.tar', not on the test.
train_data = "data/flickr8k/train/*.tar"
eval_data = "data/flickr8k/test/*.tar"
caption_key = "captions"

model = "RN50"  # only its architecture: the numbers below replace its own
image_size = 64
vision_layers = (1, 1, 1, 1)
vision_width = 16
embed_dim = 128
context_length = 32  # cuts off 34 of the 40,455 captions
text_width = 128
text_heads = 4
text_layers = 1
crop_scale = (0.5, 1.0)  # 6,000 photographs are few, so they are varied more than usual

batch_size = 64  # small: where a global loss should pay
lanes = 16
epochs = 40
lr = 1e-3
warmup_steps = 400
weight_decay = 0.1

eps_u = 1e-3
gamma_min = 0.3
eval_steps = 950  # every ten epochs
save_steps = 950
