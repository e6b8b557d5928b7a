"""runtime/plots.py: curves of runs, and captions in any script beside pictures."""

import json
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from runtime import plots

# ---- curves ----


def write_run(folder, steps, rest=""):
    """A run's folder with a row of metrics for each step, and `rest` behind them -> its path."""
    folder.mkdir(parents=True)
    rows = [json.dumps({"step": step, "objective": 1 / step}) + "\n" for step in steps]
    (folder / "metrics.jsonl").write_text("".join(rows) + rest)
    return str(folder)


def test_the_curves_of_one_run_go_into_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one = write_run(tmp_path / "one", [1, 2])
    two = write_run(tmp_path / "two", [1, 2])

    plots.main([one])
    assert capsys.readouterr().out.strip() == os.path.join(one, "curves.png")
    assert os.path.getsize(os.path.join(one, "curves.png")) > 1000
    assert not os.path.exists("curves.png")

    plots.main([one, two])
    assert os.path.getsize("curves.png") > 1000


def test_runs_with_the_same_folder_name_are_told_apart():
    folders = ["a/v3", "b/v3/", "b/other"]
    assert plots.run_names(folders) == ["a/v3", "b/v3", "other"]


def test_half_a_line_at_the_end_of_the_metrics_is_passed_over(tmp_path):
    run = write_run(tmp_path / "run", [1, 2], '{"step": 3, "obj')
    assert [row["step"] for row in plots.read_metrics(run)] == [1, 2]
    plots.main([run])


@pytest.mark.parametrize("content, message", [("", "has no rows"), (None, "no metrics.jsonl")])
def test_a_run_without_rows_is_named_in_one_line(tmp_path, content, message):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        plots.main([str(tmp_path / "run")])


def test_a_picture_that_cannot_be_written_is_said_in_one_line(tmp_path):
    run = write_run(tmp_path / "run", [1, 2])
    with pytest.raises(SystemExit, match="error: .* cannot be written: No such file"):
        plots.main([run, f"--out={tmp_path}/nowhere/curves.png"])


# ---- captions in any script ----


def draw(texts, path):
    """Draw a row with one image for each text. A warning is an error."""
    rows = []
    for text in texts:
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        rows.append(SimpleNamespace(text=text, images=[image], right=[True]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.draw_found(rows, str(path))


@pytest.fixture
def system_fonts(monkeypatch):
    """The files of fonts that this system has, besides those of matplotlib: a list to append to."""
    from matplotlib import font_manager

    paths = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    return paths


def test_texts_without_a_font_are_drawn_without_warnings(tmp_path, system_fonts, capsys):
    texts = ["中文，説明", "कुत्ता दौड़ता है", "🤖 and 👩‍🚀", "كلب يركض", "собака"]
    draw(texts, tmp_path / "found.png")

    assert os.path.getsize(tmp_path / "found.png") > 1000
    (line,) = capsys.readouterr().out.splitlines()
    assert "fonts-noto-cjk and fonts-noto-core and fonts-symbola" in line
    drawn, _ = plots.drawable(texts)
    assert drawn[0] == plots.MISSING * 5
    assert drawn[2:] == [f"{plots.MISSING} and {plots.MISSING}\u200d{plots.MISSING}", *texts[3:]]


def test_no_text_breaks_the_picture(tmp_path, capsys):
    """Formulas that are none, control characters, half of a surrogate pair, nothing."""
    texts = ["$5 or $10", r"$\nothing_{$ $", "a\x1b[31m\x00\tb\nc\u2028d", "\ud800", ""]
    draw(texts, tmp_path / "found.png")
    drawn, _ = plots.drawable(texts)
    assert drawn == ["$5 or $10", r"$\nothing_{$ $", "a [31m  b c d", plots.MISSING, ""]
    assert capsys.readouterr().out == ""


def write_font(path, character):
    """A font, Test Sans, with a square for one character -> its path."""
    square = TTGlyphPen(None)
    square.moveTo((100, 0))
    square.lineTo((100, 800))
    square.lineTo((900, 800))
    square.lineTo((900, 0))
    square.closePath()

    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "square"])
    font.setupCharacterMap({ord(character): "square"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 100)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Test Sans", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800)
    font.setupPost()
    font.save(path)
    return str(path)


def test_a_font_that_was_installed_later_is_found(tmp_path, system_fonts, capsys):
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    system_fonts += [str(damaged), write_font(tmp_path / "test.ttf", "中")]

    texts, families = plots.drawable(["中 a"])
    assert texts == ["中 a"]
    assert families == [plots.DEFAULT_FONT, "Test Sans"]
    draw(["中 a"], tmp_path / "found.png")
    assert capsys.readouterr().out == ""
