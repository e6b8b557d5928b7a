# Other image towers than a ResNet: a small ViT, and a ConvNeXt of timm's. Is FastCLIP's lead at
# small batches the ResNet's own? (An open question of the paper.)
title = "Zero-shot top-1 on the unseen style with other image towers"
base = "../configs/emoji.py"
seeds = (1, 2, 3)
