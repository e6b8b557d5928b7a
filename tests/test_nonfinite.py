"""Numbers that are not finite: a run stops before anything of it is saved, or skips the step."""

import math
import re

import pytest
import torch

from helpers import (
    SHORT_RUN,
    TINY_RESNET,
    checkpoint_files,
    checkpoint_folder,
    newest_checkpoint,
    start_ranks,
    train,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.mark.parametrize("fault_name, what", [("feature", "objective"), ("gradient", "gradient")])
def test_nonfinite_stops_the_run_with_step_and_ids(tmp_path, sets, fault, fault_name, what):
    """It stops before anything of the step is saved, although a save is due at that step."""
    out = str(tmp_path / "run")
    fault(f"{fault_name}@8:0")
    message = f"step 8: the {what} is not finite: on rank 0, sample ids"
    with pytest.raises(RuntimeError, match=message):
        train(out, sets, **SHORT_RUN)
    assert newest_checkpoint(out) == "step-00000004"

    train(out, sets, **SHORT_RUN, resume="auto")
    assert newest_checkpoint(out) == "step-00000012"


def test_nonfinite_on_one_of_two_ranks_names_that_rank(tmp_path, sets):
    out = str(tmp_path / "run")
    message = r"step 3: the gradient is not finite: on rank 1, sample ids \d+, "
    ranks = start_ranks("tests/faults.py", ["gradient@3:1"], out, sets, 2, log_steps=1)
    for status, printed in wait_for(ranks):
        assert status == 1, printed
        assert re.search(message, printed), printed


@pytest.mark.parametrize("model", [{}, TINY_RESNET], ids=["vit", "resnet"])
def test_nonfinite_steps_can_be_skipped(tmp_path, sets, fault, capsys, model):
    """Nothing of them is left: metrics, weights, running statistics and u-state are finite."""
    out = str(tmp_path / "run")
    fault("feature@5:0,gradient@7:0")
    rows = train(out, sets, **{**SHORT_RUN, **model}, skip_nonfinite=True)

    assert rows[-1]["skipped"] == 2
    for row in rows:
        assert math.isfinite(row["objective"])
        assert math.isfinite(row["grad_norm"])
    printed = capsys.readouterr().out
    assert "skipped step 5: the objective" in printed
    assert "skipped step 7: the gradient" in printed

    files = checkpoint_files(checkpoint_folder(out, 12))
    for tensor in files["model.pt"]["state_dict"].values():
        assert torch.isfinite(tensor.float()).all()
    # The first two columns are log u, -inf before the first visit.
    table = files["state-00000-of-00001.pt"]["table"]
    assert torch.isfinite(table[:, 2:]).all()


def test_too_many_skipped_steps_stop_the_run(tmp_path, sets, fault):
    fault(",".join(f"feature@{step}:0" for step in range(2, 20)))
    settings = {**SHORT_RUN, "max_steps": 24, "log_steps": 1, "skip_nonfinite": True}
    with pytest.raises(RuntimeError, match="11 of 12 steps were not finite"):
        train(str(tmp_path / "run"), sets, **settings)


def test_a_float16_scaler_finds_its_scale_by_skipping(tmp_path, sets, monkeypatch):
    """Steps whose scaled gradient overflows are skipped, and the scale falls until none does.

    float16 needs a GPU. Here the scaler of a float32 run begins with a scale that overflows.
    """
    scalers = []
    plain_scaler = torch.amp.GradScaler

    def scaler_that_overflows(device, enabled):
        scalers.append(plain_scaler(device, init_scale=2.0**127))
        return scalers[-1]

    monkeypatch.setattr(torch.amp, "GradScaler", scaler_that_overflows)
    rows = train(str(tmp_path / "run"), sets, **SHORT_RUN, skip_nonfinite=True)

    assert 0 < rows[-1]["skipped"] < 10
    assert scalers[0].get_scale() < 2.0**127
    # All steps of the first row were skipped, so it has no objective.
    assert [row["objective"] is None for row in rows] == [True, False, False, False]
    assert rows[-1]["objective"] < 10
