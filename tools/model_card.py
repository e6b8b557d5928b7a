"""The model card of an export: the README.md that says what a model is and how it was trained."""

import dataclasses
import json
import math
import os

import model as models
from config import JOB_KEYS, Config
from loss import get_algorithm

# The first line after the title. An export has it, so that it is known as one.
MADE_BY = "Trained with FastCLIP, and exported by `python -m tools.export`."

# What the card says in sentences of its own.
IN_SENTENCES = (
    "algorithm",
    "equations",
    "model",
    "batch_size",
    "train_data",
    "eval_data",
    "caption_key",
)

CITATION = """\
@article{wei2024fastclip,
  title   = {FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP Training with
             Limited Resources},
  author  = {Wei, Xiyuan and Ye, Fanjiang and Yonay, Ori and Chen, Xingyu and Sun, Baixi and
             Tao, Dingwen and Yang, Tianbao},
  journal = {arXiv preprint arXiv:2407.01445},
  year    = {2024}
}"""


def model_card(title, library, usage, model, c, step, results, checked):
    """-> the text of README.md.

    library, usage: of the module that writes the export, such as tools/to_hf.py.
    c, step: the config of the training, and how many steps of it are done.
    results: the content of eval.json, or None.
    checked: a sentence on how the export was compared with the model.
    """
    parts = [
        front_matter(library),
        f"# {title}",
        MADE_BY,
        description(model, c),
        "## Use",
        f"```python\n{usage}\n```",
        checked,
        "## Training",
        training(model, c, step),
        "## Data",
        data(c),
        "## Results",
        results_table(results),
        "## Settings",
        settings(c),
        "## Licence",
        "Not stated. Who publishes this model says here under which licence, and adds a line "
        "`license: ...` to the top of this file. Mind the licence of the training data.",
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(library):
    """What the Hugging Face Hub reads."""
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: zero-shot-image-classification\n"
        "tags:\n- clip\n- fastclip\n---"
    )


def description(model, c):
    count = models.num_parameters(model)
    return (
        f"A CLIP model: an image tower ({c.model}, {count['image'] / 1e6:.1f} M parameters) and a "
        f"text tower ({count['text'] / 1e6:.1f} M) that map into one space of {model.embed_dim} "
        f"dimensions. Images are {model.image_size} x {model.image_size} pixels: the shorter side "
        "is resized, bicubically, and the centre is cut out. Captions have at most "
        f"{model.context_length} tokens, both ends included."
    )


def training(model, c, step):
    algorithm = get_algorithm(c.algorithm)
    text = (
        f"From random weights, by `algorithm = {c.algorithm}` (loss {algorithm.loss}, "
        f"`equations = {c.equations}`), for {step:,} steps of {c.batch_size:,} pairs: "
        f"{step * c.batch_size:,} samples seen."
    )
    if algorithm.tau == "sample":
        return (
            f"{text} The temperature was learned for each training sample, and these are no part "
            f"of the model: logit_scale holds the initial one, tau = {c.tau_init:g}, and only the "
            "order of the similarities is meaningful."
        )
    tau = math.exp(-model.logit_scale.item())
    how = "learned" if algorithm.learned else "constant"
    return f"{text} The temperature, {how}, is tau = {tau:.4g}; logit_scale = ln(1 / tau)."


def data(c):
    patterns = "\n".join(f"* `{pattern}`" for pattern in c.train_data)
    where = f"entry `{c.caption_key}` of each KEY.json" if c.caption_key else "KEY.txt"
    return (
        f"Trained on the image-text pairs of these shards (captions: {where}):\n\n{patterns}\n\n"
        "What is in them, where they are from and how they were filtered is for the one who "
        "publishes this model to say."
    )


def results_table(results):
    if results is None:
        return "None are known. `python eval.py RUN` makes them."

    lines = []
    for one in results["sets"]:
        # Counts are integers, shares are floats.
        shares = {key: value for key, value in one.items() if isinstance(value, float)}
        lines += [f"{one['name']}: {size_of_set(one)}.", "", "| measure | % |", "|---|---|"]
        lines += [f"| {key} | {100 * share:.2f} |" for key, share in shares.items()]
        lines.append("")

    mean = results.get("imagenet_and_variants")
    if mean is not None:
        lines.append(f"ImageNet and its variants, mean top-1 of the seven sets: {100 * mean:.2f} %")
    return "\n".join(lines).rstrip()


def size_of_set(one):
    """How much of a set the results are of. one: an entry of "sets" in eval.json."""
    parts = [f"{one['images']:,} images"]
    if one.get("classes"):
        parts.append(f"{one['classes']:,} classes, {one['templates']:,} templates")
    if one.get("left_out"):
        parts.append(f"left out: {sum(one['left_out'].values()):,}")
    return ", ".join(parts)


def settings(c):
    """The settings that differ from the defaults, as a table."""
    rows = []
    defaults = Config()
    for field in dataclasses.fields(Config):
        value = getattr(c, field.name)
        is_default = value == getattr(defaults, field.name)
        if not is_default and field.name not in (*JOB_KEYS, *IN_SENTENCES):
            rows.append(f"| {field.name} | `{value!r}` |")

    if not rows:
        return "All others are the defaults."
    head = ["Those that differ from the defaults:", "", "| setting | value |", "|---|---|"]
    return "\n".join(head + rows)


def read_results(path):
    """Read eval.json -> (its content, ""), or (None, why there are no results)."""
    if not os.path.exists(path):
        return None, f"there is no {path}"
    try:
        with open(path) as f:
            results = json.load(f)
        results_table(results)
        os.path.normpath(results["checkpoint"])
        return results, ""
    except OSError as error:
        return None, f"{path} cannot be read: {error.strerror or error}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return None, f"{path} has not the form that eval.py writes"
