"""config.py: types, nearest names, files that start from another, and every config in configs/."""

import glob
import os
import re
import sys

import pytest

import config
from config import ConfigError
from conftest import ROOT
from tools.imports import dot, import_graph, modules, without_shortcuts

PAPER = [
    f"{d}_{a}"
    for d in ("cc3m", "cc12m", "emoji")
    for a in ("openclip", "sogclr", "isogclr", "v0", "v1", "v2", "v3")
] + [f"laion315m_{a}" for a in ("openclip", "v0", "v1", "v2", "v3")]

OTHERS = [
    f"{d}_{a}"
    for d in ("datacomp_small", "datacomp_medium", "icons", "flickr8k")
    for a in ("openclip", "v1", "v3")
]


@pytest.mark.parametrize("name", PAPER + OTHERS)
def test_every_config_of_a_benchmark_loads(name):
    c = config.load([os.path.join(ROOT, "configs", name + ".py")])
    suffix = name.split("_")[-1]
    assert c.algorithm == (f"fastclip-{suffix}" if suffix.startswith("v") else suffix)
    assert c.out_dir == os.path.join("runs", name)


def test_the_papers_figures():
    c = config.load([os.path.join(ROOT, "configs", "laion315m_v3.py")])
    assert (c.model, c.batch_size, c.epochs, c.lr, c.lr_min, c.warmup_steps, c.weight_decay) == (
        "ViT-B-16",
        5120,
        42,
        2e-4,
        4e-5,
        13200,
        0.2,
    )
    assert (c.gamma_min, c.gamma_decay_epochs, c.lr_tau, c.rho, c.eps_u, c.equations) == (
        0.8,
        10,
        5e-5,
        16.0,
        1e-6,
        "release",
    )
    c = config.load([os.path.join(ROOT, "configs", "cc3m_v2.py")])
    assert (c.model, c.tau_init, c.lr_tau, c.rho) == ("RN50", 0.03, 0.0133, 7.0)


@pytest.mark.parametrize(
    "words,message",
    [
        (["--lerning_rate=1"], "unknown key 'lerning_rate'"),
        (["--batchsize=8"], "did you mean 'batch_size'"),
        (["--lr=fast"], "lr = 'fast' is of type str; it must be float"),
        (["--batch_size=1.5"], "batch_size = 1.5 is of type float; it must be int"),
        (["--compile=1"], "must be True or False or 'auto'"),
        (["--lr"], "write --key=value"),
        (["--eval_data=", "val"], "write --key=value, here --eval_data=val"),
        (["--lr", "1e-3"], "write --key=value, here --lr=1e-3"),
        (["--train-data=a.tar"], "write --key=value, here --train_data=a.tar"),
        (["--resume_changes"], "write --key=value, here --resume_changes=True"),
        (["--no-such", "3"], "unknown key 'no_such'"),
        (["--batch-size", "64"], "--batch_size=N, the batch of all ranks together"),
        (["--imagenet-val", "folder"], "Here: --eval_data="),
        (["--fastclip"], "Here: --algorithm="),
        (["--precision=amp_bf16"], "did you mean 'bf16'"),
        (["no_such.py"], "no config file 'no_such.py'; there are some in .*configs/"),
        (["nope.py"], "no config file 'nope.py'; there are some in .*configs/"),
        (["emoji_v3"], "did you mean '.*configs/emoji_v3.py'"),
        (["configs/emojiv3.py"], "did you mean '.*configs/emoji_v3.py'"),
        (["--batch_size=10", "--lanes=4"], "lanes = 4 does not divide batch_size = 10"),
        (["--gamma_min=0"], r"gamma_min = 0.0 must lie in \(0, 1\]"),
        (["--batch_size=1"], "no negatives"),
        (["--tau_init=5"], "tau_init"),
        (["--crop_scale=(0.9,0.1)"], "crop_scale"),
        (["--lr=-1"], "must not be negative"),
        (["--train_data=[1]"], "must hold strings"),
        (["--train_data=0.tar", "--train_data=1.tar"], "more than once: put the pattern in quotes"),
        (["--resume=True"], r"it must be str \(resume: none, auto \(the newest"),
        (["--crop_scale=0.9"], "it must be tuple .*smallest and largest share"),
    ],
)
def test_bad_settings_are_refused_with_a_word(words, message):
    with pytest.raises(ConfigError, match=message):
        config.load(words)


def test_the_words_of_other_programs_name_keys_of_ours():
    named = re.findall(r"--(\w+)=", " ".join(config.OTHER_WORDS.values()))
    assert len(named) > 20
    assert not set(named) - set(config.HINTS)
    assert not set(config.OTHER_WORDS) & set(config.HINTS)


def test_a_file_starts_from_another_and_the_command_line_comes_last(tmp_path):
    (tmp_path / "a.py").write_text(
        "import math\nlr = 1e-3\nbatch_size = 64\n_hidden = 1\ntrain_data = 'x.tar'\n"
    )
    (tmp_path / "b.py").write_text("base = 'a.py'\nlr = 2e-3\n")
    c = config.load([str(tmp_path / "b.py"), "--batch_size=32"])
    assert (c.lr, c.batch_size, c.train_data) == (2e-3, 32, ("x.tar",))
    (tmp_path / "c.py").write_text("batchsize = 3\n")
    with pytest.raises(
        ConfigError, match=r"c.py: unknown key 'batchsize'; did you mean 'batch_size'"
    ):
        config.load([str(tmp_path / "c.py")])
    (tmp_path / "d.py").write_text("base = 'd.py'\n")
    with pytest.raises(ConfigError, match="circle"):
        config.load([str(tmp_path / "d.py")])
    (tmp_path / "e.py").write_text("lr = \n")
    with pytest.raises(ConfigError, match="e.py: SyntaxError"):
        config.load([str(tmp_path / "e.py")])


def test_the_resolved_config_loads_as_a_config(tmp_path):
    c = config.load(
        ["--lr=1e-4", "--vision_layers=(1,1,1,1)", "--train_data=a.tar", "--lr_tau=None"]
    )
    (tmp_path / "r.py").write_text(config.as_text(c))
    again = config.load([str(tmp_path / "r.py")])
    assert again == c


def test_help_lists_every_key():
    text = config.help_text()
    assert all(f"--{key}=" in text for key in config.HINTS)


# fmt: off
LAYERS = [  # from the bottom; a name without a dot stands for all files of a folder
    {"config"},
    {"dist"},
    {"ingest.images", "ingest.tokenizer"},
    {"ingest.folders"},
    {"ingest.urls"},
    {"ingest.left_out"},
    {"ingest.tar"},
    {"ingest.counting"},
    {"ingest.index"},
    {"ingest.reader"},
    {"ingest.workers", "ingest.sources"},
    {"ingest.class_names"},
    {"ingest.classes"},
    {"ingest.class_folders", "ingest.labels", "ingest.karpathy"},
    {"ingest.layouts"},
    {"ingest.evaluation"},
    {"runtime.hardware", "runtime.ranks", "runtime.watchdog", "runtime.plots", "runtime.results"},
    {"runtime.checkpoint", "runtime.log"},
    {"runtime.job"},
    {"model", "loss"},
    {"optim"},
    {"data"},
    {"eval"},
    {"runtime.plan"},
    {"train"},
    {"bench"},
    {"tools"},
]
# fmt: on


def layer(name):
    """The number of a module's layer, from the bottom."""
    for number, names in enumerate(LAYERS):
        if name in names or name.split(".")[0] in names:
            return number
    raise AssertionError(f"{name} is in no layer: add it to LAYERS")


def test_imports_only_go_down():
    """A module imports modules of lower layers only; bench/ and tools/ also their own files."""
    for name, imported in import_graph().items():
        folder = name.split(".")[0]
        for other in imported:
            same_folder = folder in ("bench", "tools") and other.startswith(folder + ".")
            assert same_folder or layer(other) < layer(name), f"{name} imports {other}"


def test_the_drawing_of_imports_is_the_present_one():
    with open(os.path.join(ROOT, "docs", "imports.dot")) as f:
        drawn = f.read()
    assert drawn == dot(without_shortcuts(import_graph())) + "\n", (
        "run: python -m tools.imports > docs/imports.dot && "
        "dot -Tsvg docs/imports.dot -o docs/imports.svg"
    )


def test_the_maps_of_files_are_complete():
    """README names the files at the top level, docs/files.md those in the folders."""
    with open(os.path.join(ROOT, "README.md")) as f:
        readme = f.read()
    with open(os.path.join(ROOT, "docs", "files.md")) as f:
        files = f.read()

    for name in modules():
        folder, _, file = name.rpartition(".")
        if folder in ("", "runtime", "ingest", "bench") and not file.startswith("__"):
            assert f"`{file}.py`" in (files if folder else readme), f"{name} is in no map"


def test_the_tests_that_the_table_of_faults_names_exist():
    """Each row of docs/reliability.md names, in its last column, the tests that show it."""
    sources = ""
    for path in glob.glob(os.path.join(ROOT, "tests", "*.py")):
        with open(path) as f:
            sources += f.read()
    with open(os.path.join(ROOT, "docs", "reliability.md")) as f:
        rows = [line.strip() for line in f if line.startswith("| ")]

    named = 0
    for row in rows:
        shown_by = row.rstrip("| ").rpartition("|")[2]
        for name in re.findall(r"`([a-z0-9_]+)`", shown_by):
            assert f"def test_{name}(" in sources, row
            named += 1
    assert named > 60


def test_words_after_a_folder_are_no_config():
    with pytest.raises(ConfigError, match="unexpected word 'x.py': a folder comes first"):
        config.load(["x.py"], saved={})


def test_a_reader_who_has_seen_enough_leaves_no_traceback(monkeypatch):
    """`| head` closes the pipe of standard output; another broken pipe is an error of its own."""
    reading, writing = os.pipe()
    monkeypatch.setattr("sys.stdout", os.fdopen(writing, "w"))
    with pytest.raises(BrokenPipeError):
        config.or_exit(broken_pipe)

    os.close(reading)
    with pytest.raises(SystemExit) as end:
        config.or_exit(print, "a line")
    assert end.value.code == 141
    sys.stdout.close()


def broken_pipe():
    raise BrokenPipeError


def test_ctrl_c_leaves_no_traceback():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        config.or_exit(interrupted)
    assert end.value.code == 130
