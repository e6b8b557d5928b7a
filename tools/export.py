"""A checkpoint for other libraries: `python -m tools.export RUN_OR_CHECKPOINT --to open_clip | hf`.

    open_clip    any tower that open_clip has: a folder for `local-dir:` and `hf-hub:`
    hf           a ViT, as CLIPModel and CLIPProcessor of transformers

It writes a folder, with a model card and SHA256SUMS, that is complete or absent. Before the folder
gets its name, the other library loads it, prepares a few images and captions by its own code, and
must compute the features that we compute. tools/to_open_clip.py and tools/to_hf.py write and load.
"""

import argparse
import os
import shutil
import stat
import sys
import tempfile
import time

import torch

import config as configs
import model as models
from config import ConfigError
from eval import find_checkpoint
from ingest.tokenizer import Tokenizer
from runtime import checkpoint
from tools import to_hf, to_open_clip
from tools.model_card import MADE_BY, model_card, read_results

MODEL_CARD = "README.md"

LARGEST_DIFFERENCE = 1e-4  # of a feature, in rows of length 1
NUM_COMPARED = 4  # images, and captions
TEMPORARY = ".fastclip-export-"  # how the names of unfinished exports begin
STALE = 3600  # seconds after which such a folder is taken for that of a killed export

WORDS = "a photo of two red birds that sit in the snow beside an old house".split()


# ---- the check ----


def largest_difference(folder, library, model):
    """The largest difference between our features and those of the other library, a float.

    library: the module tools.to_open_clip or tools.to_hf, whose `encode` loads the folder.
    model: in eval mode. Raises ImportError without the library, and whatever it raises.
    """
    size = model.image_size
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_COMPARED, 3, size, size)
    pictures = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    texts = captions_of_several_lengths(model.context_length)

    ours = features(model, pictures, texts)
    theirs = library.encode(folder, pictures, texts)

    largest = 0.0
    for x, y in zip(ours, theirs):
        if not torch.isfinite(y).all():
            return float("inf")
        largest = max(largest, (x - y).abs().max().item())
    return largest


@torch.no_grad()
def features(model, pictures, texts):
    """uint8 (n, 3, S, S) and m str -> our features, float32 (n, d) and (m, d), in eval mode."""
    tokens = Tokenizer(model.context_length)(texts)  # (m, context_length)
    return model.encode_image(pictures), model.encode_text(tokens)


def captions_of_several_lengths(context_length):
    """NUM_COMPARED captions: of one word, of some, of as many as fit or nearly, of too many."""
    texts = []
    for length in (1, context_length // 3, context_length - 2, context_length + 10):
        words = [WORDS[i % len(WORDS)] for i in range(max(1, length))]
        texts.append(" ".join(words))
    return texts


def check_written(folder, library, model):
    """Compare the export with the model -> a sentence on that, for the card and the screen.

    Raises ConfigError if the other library cannot load it, or computes other features.
    """
    try:
        difference = largest_difference(folder, library, model)
    except ImportError as error:
        return f"It was not compared with {library.LIBRARY}, which is not installed ({error})."
    except Exception as error:
        raise ConfigError(
            f"{library.LIBRARY} cannot load the export, which is not kept: {one_line(error)}"
        ) from error

    if difference > LARGEST_DIFFERENCE:
        raise ConfigError(
            f"{library.LIBRARY} computes other features from the export, which is not kept: they "
            f"differ by {difference:.1e}, more than {LARGEST_DIFFERENCE:.0e}"
        )
    return (
        f"{NUM_COMPARED} images and {NUM_COMPARED} captions were encoded by {library.LIBRARY} and "
        f"by the training code: features of length 1 differ by {difference:.1e} at most."
    )


def one_line(error):
    """The type and the beginning of the message of an error, which may have many lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


# ---- the folder ----


def check_target(out):
    """ConfigError if `out` holds anything but an earlier export, or cannot be written."""
    if os.path.isdir(out):
        reason = why_not_replaceable(out)
        if reason:
            raise ConfigError(
                f"{out} will not be replaced, because {reason}: remove it, or choose another --out"
            )
    elif os.path.lexists(out):
        raise ConfigError(f"{out} is a file: choose another --out, a folder")

    with configs.writing_to(out, "out"):
        checkpoint.check_writable(out)


def why_not_replaceable(folder):
    """Why a folder is no earlier export that was left as it was; "" if it is one, or empty."""
    try:
        names = os.listdir(folder)
        return why_no_export(folder, names) if names else ""
    except (FileNotFoundError, ValueError):  # no sums or no card, or they are no text
        return "it holds something else than an export"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"


def why_no_export(folder, names):
    """Like why_not_replaceable. names: of what is in the folder. OSError, ValueError."""
    sums = checkpoint.read_sums(folder)
    with open(os.path.join(folder, MODEL_CARD), encoding="utf-8") as f:
        is_export = MADE_BY in f.read()
    if not is_export:
        return "it holds something else than an export"

    others = set(names) - {*sums, checkpoint.SUMS}
    if others:
        return f"it also holds {', '.join(sorted(others)[:4])}"

    missing = set(sums) - set(names)
    if missing:
        return f"{', '.join(sorted(missing)[:4])} was removed since the export"

    changed = [name for name in sums if sha256_in(folder, name) != sums[name]]
    if changed:
        return f"{', '.join(changed[:4])} was changed since the export"
    return ""


def sha256_in(folder, name):
    return checkpoint.sha256_of(os.path.join(folder, name))


def check_space(out, model):
    """ConfigError if the disk has no room for the weights."""
    needed = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    free = shutil.disk_usage(existing_folder(out)).free
    if free < needed:
        raise ConfigError(
            f"{out} has no room: the weights take {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are "
            "free; make room, or choose another --out"
        )


def existing_folder(path):
    """The folder above `path`, or the next one above that exists."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def write_sums(folder):
    lines = [f"{sha256_in(folder, name)}  {name}\n" for name in sorted(os.listdir(folder))]
    with open(os.path.join(folder, checkpoint.SUMS), "w") as f:
        f.writelines(lines)


def set_modes(folder):
    """Let the umask decide who may read each file, as it has for the model card.

    safetensors makes files that only their owner may read.
    """
    mode = stat.S_IMODE(os.stat(os.path.join(folder, MODEL_CARD)).st_mode)
    for name in os.listdir(folder):
        os.chmod(os.path.join(folder, name), mode)


def remove_stale(place):
    """Remove from the folder `place` what killed exports have left there, long enough ago."""
    for entry in os.scandir(place):
        is_folder = entry.is_dir(follow_symlinks=False)
        if not is_folder or not entry.name.startswith(TEMPORARY):
            continue
        if time.time() - entry.stat().st_mtime > STALE:
            shutil.rmtree(entry.path, ignore_errors=True)


def put_in_place(folder, out, aside):
    """Rename `folder` to `out`. An earlier export goes to the path `aside`."""
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    if os.path.isdir(out):
        os.rename(out, aside)
    os.rename(folder, out)


# ---- the results ----


def results_of(folder):
    """The results of a checkpoint -> (content of eval.json, ""), or (None, why there are none).

    eval.py and the end of a training write eval.json into the run's folder or, if eval.py is given
    a checkpoint, into its folder. It says of which checkpoint the results are: RUN/step-00001740.
    """
    beside = os.path.join(folder, "eval.json")
    run = run_of(folder)
    path = beside if os.path.exists(beside) or not run else os.path.join(run, "eval.json")

    results, reason = read_results(path)
    if results is None:
        return None, reason
    evaluated = os.path.basename(os.path.normpath(results["checkpoint"]))
    if evaluated != os.path.basename(os.path.normpath(folder)):
        return None, f"{path} is of another checkpoint, {results['checkpoint']}"
    return results, ""


def run_of(folder):
    """The folder of the run that the checkpoint folder belongs to; "" if it lies elsewhere."""
    above = os.path.dirname(os.path.normpath(folder))
    if os.path.basename(above) != "checkpoints":
        return ""
    return os.path.dirname(above) or "."


# ---- the command ----


def export(folder, c, out, library):
    """Write the checkpoint in `folder`, trained with the config c, to the folder `out`.

    library: the module tools.to_open_clip or tools.to_hf. Raises ConfigError, and leaves nothing,
    if the library has no such model or computes other features than we, and if nothing can be
    written.
    """
    numbers = models.resolve_numbers(c.model, c.model_numbers())
    library.check_numbers(numbers)
    check_target(out)

    model = models.create(c.model, c.tau_init, **c.model_numbers())
    library.check_model(model)
    check_space(out, model)
    checkpoint.load_model(folder, model, c)
    model.eval()

    where = existing_folder(out)
    with (
        configs.writing_to(out, "out"),
        tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=where) as temporary,
    ):
        remove_stale(where)
        partial = os.path.join(temporary, "export")
        os.mkdir(partial)

        library.write(partial, model, c.model, numbers)
        checked = check_written(partial, library, model)
        write_card(partial, folder, library, model, c, checked)
        write_sums(partial)
        set_modes(partial)

        put_in_place(partial, out, aside=os.path.join(temporary, "earlier"))
    report(out, library, checked)


def write_card(partial, folder, library, model, c, checked):
    """Write the model card of the checkpoint in `folder`. checked: of check_written."""
    results, reason = results_of(folder)
    if results is None:
        print(f"the model card has no results: {reason}; eval.py makes them", flush=True)

    step = checkpoint.read(os.path.join(folder, "train.pt"), mmap=True)["step"]
    title = os.path.basename(os.path.abspath(run_of(folder) or folder))
    card = model_card(title, library.LIBRARY, library.USAGE, model, c, step, results, checked)
    with open(os.path.join(partial, MODEL_CARD), "w", encoding="utf-8") as f:
        f.write(card)


def report(out, library, checked):
    """Print what was written, and how it is loaded."""
    names = sorted(os.listdir(out))
    size = sum(os.path.getsize(os.path.join(out, name)) for name in names)
    print(f"{out}, {size / 1e6:.1f} MB: {', '.join(names)}")
    print(f"{checked}\n\n{library.USAGE.replace('FOLDER', out)}")


def library_of(name):
    """--to -> the module that writes for this library. ConfigError if there is none."""
    if name == "open_clip":
        return to_open_clip
    if name == "hf":
        return to_hf
    raise ConfigError(f"--to {name}: write --to open_clip, or --to hf for transformers")


def default_out(folder, name):
    """RUN/exports/NAME. ConfigError if the checkpoint folder is not in a run."""
    run = run_of(folder)
    if not run:
        raise ConfigError(f"{folder} is not in the folder of a run: say where to write by --out")
    return os.path.join(run, "exports", name)


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.export",
        description="Write a checkpoint as a folder that another library loads.",
    )
    parser.add_argument("checkpoint", help="folder of a run (its newest one), or of a checkpoint")
    parser.add_argument("--to", required=True, help="open_clip, or hf for transformers (ViTs only)")
    parser.add_argument(
        "--out", help="folder to write (default: RUN/exports/ and the word of --to)"
    )
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    library = library_of(args.to)
    folder = find_checkpoint(args.checkpoint)
    c = checkpoint.saved_config(folder)
    export(folder, c, args.out or default_out(folder, args.to), library)


if __name__ == "__main__":
    configs.or_exit(main, sys.argv[1:])
