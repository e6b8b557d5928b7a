"""An export for open_clip, 3.0 or newer: `local-dir:FOLDER`, or `hf-hub:NAME` once it is there.

    open_clip_config.json         the numbers of the model, and how an image is prepared
    open_clip_model.safetensors   the weights, whose names are open_clip's already

There are no tokenizer files: open_clip's default tokenizer is CLIP's, as ours is.
"""

import json
import os

import torch
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image

from config import ConfigError
from model import PIXEL_MEAN, PIXEL_STD, is_resnet

LIBRARY = "open_clip"  # as the model card calls it

USAGE = """\
import open_clip

name = "local-dir:FOLDER"  # or "hf-hub:USER/NAME", once it is on the Hub
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokenizer = open_clip.get_tokenizer(name)
model.eval()

images = preprocess(picture).unsqueeze(0)  # picture: a PIL image in RGB
image_features = model.encode_image(images, normalize=True)
text_features = model.encode_text(tokenizer(["a red bird"]), normalize=True)"""


def check_numbers(numbers):
    """ConfigError if open_clip has no such tower. numbers: those of model.resolve_numbers."""
    if numbers.get("vision_norm") == "group":
        raise ConfigError(
            'vision_norm = "group": the ResNets of open_clip have BatchNorm only, so it cannot '
            "load this model"
        )


def check_model(model):
    """ConfigError if open_clip would make another timm tower than ours from the same name."""
    trunk = getattr(model.visual, "trunk", None)
    if trunk is None:
        return

    own_size = trunk.default_cfg["input_size"][-1]
    if model.image_size != own_size and hasattr(trunk, "set_input_size"):
        raise ConfigError(
            f"image_size = {model.image_size}: open_clip makes this timm model for its own size, "
            f"{own_size}, only, so it cannot load the weights"
        )

    width = model.visual.head.proj.in_features
    if width != trunk.num_features:
        raise ConfigError(
            f"open_clip expects {trunk.num_features} features of this timm model, which returns "
            f"{width}, so it cannot load the model"
        )


def write(folder, model, name, numbers):
    """Write the config and the weights of a model, made from `name` and `numbers`. OSError."""
    content = {
        "model_cfg": {
            "embed_dim": model.embed_dim,
            "vision_cfg": vision_config(model, name, numbers),
            "text_cfg": {
                "context_length": model.context_length,
                "vocab_size": numbers["vocab_size"],
                "width": numbers["text_width"],
                "heads": numbers["text_heads"],
                "layers": numbers["text_layers"],
            },
        },
        "preprocess_cfg": {
            "mean": PIXEL_MEAN,
            "std": PIXEL_STD,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    with open(os.path.join(folder, "open_clip_config.json"), "w") as f:
        json.dump(content, f, indent=2)

    # safetensors takes neither strided tensors nor two of them in the same memory.
    weights = {}
    for key, x in model.state_dict().items():
        weights[key] = x.clone(memory_format=torch.contiguous_format)
    save_file(weights, os.path.join(folder, "open_clip_model.safetensors"), {"format": "pt"})


def vision_config(model, name, numbers):
    """-> the vision_cfg of open_clip's config."""
    if name.startswith("timm:"):
        return {
            "timm_model_name": name.removeprefix("timm:"),
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": model.image_size,
        }

    width = numbers["vision_width"]
    vision = {
        "image_size": model.image_size,
        "layers": numbers["vision_layers"],
        "width": width,
    }
    if not is_resnet(model):
        vision["patch_size"] = numbers["patch_size"]
        # open_clip divides the width by this to get the number of heads. Its default, 64, is too
        # much for a narrower tower, which has one head here.
        vision["head_width"] = model.visual.transformer.resblocks[0].attn.head_size
    return vision


@torch.no_grad()
def encode(folder, pictures, texts):
    """The features that open_clip computes from the folder, all of its own code.

    pictures: uint8 (n, 3, S, S); texts: m str -> float32 (n, d) and (m, d), rows of length 1.
    Raises ImportError without open_clip, and whatever open_clip raises.
    """
    import open_clip  # here, because an export can do without it

    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()

    images = torch.stack([preprocess(to_pil_image(picture)) for picture in pictures])
    image_features = model.encode_image(images, normalize=True)
    text_features = model.encode_text(tokenizer(texts), normalize=True)
    return image_features, text_features
