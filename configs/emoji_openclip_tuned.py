base = "emoji.py"
algorithm = "openclip"
# The best of seven temperatures, constant or learned, at one learning rate, and of three further
# rates, of which the highest was best, on a style held out of the training
# (experiments/tune_batch_size.py). Learned as usual, from 0.07 with the rate of the weights, the
# temperature falls to 0.03, which costs points.
tau_init = 0.1
lr_tau = 0.0
lr = 4e-3
