"""An export for Hugging Face transformers: a CLIPModel with its CLIPProcessor. ViTs only.

config.json, model.safetensors                    the model
processor_config.json, preprocessor_config.json   how an image is prepared; for transformers 5,
                                                  and for other readers
tokenizer.json, tokenizer_config.json             CLIP's tokenizer
vocab.json, merges.txt                            the same, for other readers
"""

import torch
from torchvision.transforms.functional import to_pil_image

from config import ConfigError
from ingest.tokenizer import END_OF_PIECE, EOT, SOT, byte_spelling, read_merges
from model import PIXEL_MEAN, PIXEL_STD

LIBRARY = "transformers"  # as the model card calls it

USAGE = """\
from transformers import CLIPModel, CLIPProcessor

name = "FOLDER"  # or "USER/NAME", once it is on the Hub
model = CLIPModel.from_pretrained(name)
processor = CLIPProcessor.from_pretrained(name)

# Captions from the web: clean each first, as in training, by
# text = html.unescape(html.unescape(ftfy.fix_text(text)))
# <|startoftext|> and <|endoftext|> in a caption are special tokens here, plain text in training.
# truncation=True, because a caption may be longer than the model's context. picture: a PIL image.
inputs = processor(
    images=[picture], text=["a red bird"], return_tensors="pt", padding=True, truncation=True
)
outputs = model(**inputs)
image_features, text_features = outputs.image_embeds, outputs.text_embeds"""

# The parts of a transformer block: our name, and that of transformers.
BLOCK_PARTS = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def check_numbers(numbers):
    """ConfigError without transformers 5 or newer, and for a tower that is no ViT of ours.

    numbers: those of model.resolve_numbers.
    """
    if "patch_size" not in numbers:
        raise ConfigError(
            "transformers has CLIP with a ViT only, so it cannot load this image tower: export "
            "it by --to open_clip"
        )
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"--to hf needs transformers: pip install transformers ({error})"
        ) from error

    version = transformers.__version__
    if int(version.partition(".")[0]) < 5:  # its tokenizer has other arguments
        raise ConfigError(
            f"--to hf needs transformers 5 or newer, and this is {version}: pip install -U "
            "transformers"
        )


def check_model(model):
    """There is nothing to refuse in a model whose numbers are good."""


def write(folder, model, name, numbers):
    """Write the model, made from `name` and `numbers`, and its processor. OSError."""
    from transformers import CLIPModel

    quiet()
    theirs = CLIPModel(config_of(model, numbers))
    theirs.load_state_dict(weights_of(model))
    theirs.save_pretrained(folder)
    write_processor(folder, model)


def quiet():
    """No bars and no warnings of transformers: an export says itself what happens."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# ---- the model ----


def config_of(model, numbers):
    """-> the CLIPConfig of a model with these numbers."""
    from transformers import CLIPConfig

    exact_gelu = "gelu"  # the default is OpenAI's approximation
    text = {
        "vocab_size": numbers["vocab_size"],
        "max_position_embeddings": model.context_length,
        "hidden_size": numbers["text_width"],
        "intermediate_size": 4 * numbers["text_width"],
        "num_attention_heads": numbers["text_heads"],
        "num_hidden_layers": numbers["text_layers"],
        "hidden_act": exact_gelu,
        "projection_dim": model.embed_dim,
        "bos_token_id": SOT,
        # The feature is read at the first token of this id. So the padding, which follows it, may
        # be the same token, as in OpenAI's models.
        "eos_token_id": EOT,
        "pad_token_id": EOT,
    }
    vision = {
        "image_size": model.image_size,
        "patch_size": numbers["patch_size"],
        "hidden_size": numbers["vision_width"],
        "intermediate_size": 4 * numbers["vision_width"],
        "num_attention_heads": model.visual.transformer.resblocks[0].attn.heads,
        "num_hidden_layers": numbers["vision_layers"],
        "hidden_act": exact_gelu,
        "projection_dim": model.embed_dim,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=model.embed_dim)


def weights_of(model):
    """-> {name in transformers' CLIPModel: tensor} of all weights of a ViT model."""
    visual = model.visual
    weights = {
        "logit_scale": model.logit_scale,
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": model.positional_embedding,
        "text_model.final_layer_norm.weight": model.ln_final.weight,
        "text_model.final_layer_norm.bias": model.ln_final.bias,
        "text_projection.weight": model.text_projection.T,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "vision_model.pre_layrnorm.weight": visual.ln_pre.weight,  # spelt so there
        "vision_model.pre_layrnorm.bias": visual.ln_pre.bias,
        "vision_model.post_layernorm.weight": visual.ln_post.weight,
        "vision_model.post_layernorm.bias": visual.ln_post.bias,
        "visual_projection.weight": visual.proj.T,
    }
    for i, block in enumerate(model.transformer.resblocks):
        weights.update(block_weights(block, f"text_model.encoder.layers.{i}."))
    for i, block in enumerate(visual.transformer.resblocks):
        weights.update(block_weights(block, f"vision_model.encoder.layers.{i}."))
    return weights


def block_weights(block, prefix):
    """-> {prefix + name in transformers: tensor} of one transformer block."""
    weights = {}
    for our_name, their_name in BLOCK_PARTS.items():
        part = block.get_submodule(our_name)
        weights[f"{prefix}{their_name}.weight"] = part.weight
        weights[f"{prefix}{their_name}.bias"] = part.bias

    # Queries, keys and values have one matrix (3w, w) here, and three there.
    matrices = block.attn.in_proj_weight.chunk(3)  # (w, w) each
    biases = block.attn.in_proj_bias.chunk(3)  # (w,) each
    for letter, matrix, bias in zip("qkv", matrices, biases):
        weights[f"{prefix}self_attn.{letter}_proj.weight"] = matrix
        weights[f"{prefix}self_attn.{letter}_proj.bias"] = bias
    return weights


# ---- its inputs ----


def write_processor(folder, model):
    """Write how images and captions are prepared for the model."""
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    size = model.image_size
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=3,  # bicubic
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )

    merges = read_merges()
    tokenizer = CLIPTokenizer(
        vocab=vocabulary(merges), merges=merges, model_max_length=model.context_length
    )

    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    image_processor.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(folder)


def vocabulary(merges):
    """-> {token: id} in the spelling of transformers, which is that of CLIP's file of merges."""
    tokens = list(byte_spelling().values())
    tokens += [character + END_OF_PIECE for character in tokens]
    tokens += [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


@torch.no_grad()
def encode(folder, pictures, texts):
    """The features that transformers computes from the folder, all of its own code.

    pictures: uint8 (n, 3, S, S); texts: n str -> float32 (n, d) twice, rows of length 1.
    Raises whatever transformers raises.
    """
    from transformers import CLIPModel, CLIPProcessor

    quiet()
    model = CLIPModel.from_pretrained(folder, local_files_only=True)
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)

    inputs = processor(
        images=[to_pil_image(picture) for picture in pictures],
        text=texts,
        return_tensors="pt",
        padding=True,
        truncation=True,
    )
    outputs = model(**inputs)
    return outputs.image_embeds, outputs.text_embeds
