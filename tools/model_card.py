"""The model card of an export: the README.md that says what a model is and how it was trained."""

import dataclasses
import json
import math
import os

import model as models
from config import MODEL_KEYS, RUNNING_KEYS, Config
from loss import get_algorithm

# The first line after the title. An export has it, so that it is known as one.
MADE_BY = "Trained with FastCLIP, and exported by `python -m tools.export`."

# Settings that the card tells in sentences of its own.
IN_SENTENCES = (
    "algorithm",
    "equations",
    "model",
    *MODEL_KEYS,
    "batch_size",
    "train_data",
    "caption_key",
)

# Settings that do not change what is trained: the machine, and what is evaluated, saved and shown.
NOT_OF_THE_METHOD = (
    *RUNNING_KEYS,
    "grad_checkpointing",
    "train_samples",
    "index_remote",
    "allow_left_out",
    "lanes",
    "shuffle_block",
    "micro_batch",
    "eval_data",
    "eval_names",
    "eval_templates",
    "eval_steps",
    "eval_batch",
    "device",
    "compile",
    "bucket_mb",
    "loss_tile",
)

# What the rows of the tables of results mean.
MEASURES = (
    "zeroshot: each image is taken for the class whose name is nearest. R@k: retrieval among the "
    "images of a set and their own captions, also where the set has classes; the caption of "
    "another image is wrong even if its words are the same."
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
        "Put the path of the folder of this file in the place of FOLDER.",
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
        "Not stated. Whoever publishes this model should state the licence here, and add a line "
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
    changes = ", ".join(f"{key} = {value}" for key, value in c.model_numbers().items())
    name = f"{c.model} with {changes}" if changes else c.model
    return (
        f"A CLIP model ({name}): an image tower of {count['image'] / 1e6:.1f} M parameters and a "
        f"text tower of {count['text'] / 1e6:.1f} M, which map into one space of "
        f"{model.embed_dim} dimensions. Images are {model.image_size} x {model.image_size} "
        "pixels: the shorter side is resized, bicubically, and the centre is cut out. Captions "
        f"have at most {model.context_length} tokens, both ends included."
    )


def training(model, c, step):
    algorithm = get_algorithm(c.algorithm)
    text = (
        f"From random weights, by `algorithm = {c.algorithm}` (loss {algorithm.loss}, "
        f"`equations = {c.equations}`), for {counted(step, 'step')} of {c.batch_size:,} pairs: "
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
        "What is in them, where they are from and how they were filtered is for "
        "whoever publishes this model to say."
    )


def results_table(results):
    if results is None:
        return "None are known. `python eval.py RUN` makes them."

    lines = [f"Of the checkpoint `{results['checkpoint']}`, which is this model. {MEASURES}", ""]
    for one in results["sets"]:
        lines += [f"{one['name']}, in `{one['eval_data']}`: {size_of_set(one)}.", ""]
        lines += notes(one)
        lines += ["| measure | % |", "|---|---|"]

        # Counts are integers, shares are floats.
        shares = {key: value for key, value in one.items() if isinstance(value, float)}
        lines += [f"| {key} | {100 * share:.2f} |" for key, share in shares.items()]
        lines.append("")

    mean = results.get("imagenet_and_variants")
    if mean is not None:
        lines.append(f"ImageNet and its variants, mean top-1 of the seven sets: {100 * mean:.2f} %")
    return "\n".join(lines).rstrip()


def size_of_set(one):
    """How much of a set the results are of. one: an entry of "sets" in eval.json."""
    parts = [counted(one["images"], "image")]
    if one.get("classes"):
        parts.append(counted(one["classes"], "class", "classes") + source(one, "names_from"))
        parts.append(counted(one["templates"], "template") + source(one, "templates_from"))
    if one.get("left_out"):
        parts.append(f"left out: {sum(one['left_out'].values()):,}")
    return ", ".join(parts)


def source(one, key):
    """ " (from ...)", if the result of a set says so under `key`; otherwise ""."""
    return f" (from `{one[key]}`)" if one.get(key) else ""


def notes(one):
    """Lines on what makes the result of a set other than that of the benchmark of its name."""
    lines = [f"* {note}" for note in one.get("notes", ())]
    return [*lines, ""] if lines else []


def counted(number, one, many=""):
    """ "1 step", or "2,000 steps". many: the plural, if it is not `one` and an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def settings(c):
    """The settings of the method that differ from the defaults, as a table."""
    rows = []
    left_out = (*IN_SENTENCES, *NOT_OF_THE_METHOD)
    defaults = Config()
    for field in dataclasses.fields(Config):
        value = getattr(c, field.name)
        is_default = value == getattr(defaults, field.name)
        if not is_default and field.name not in left_out:
            rows.append(f"| {field.name} | `{value!r}` |")

    if not rows:
        return "All others of the method are the defaults."
    intro = "Others of the method that differ from the defaults:"
    return "\n".join([intro, "", "| setting | value |", "|---|---|", *rows])


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
