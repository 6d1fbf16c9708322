"""`rf.list_models()`: names, and a table whose figures are those of the models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import resnet_fast as rf
from resnet_fast.cli import app


def test_names_and_table() -> None:
    names = rf.list_models()
    assert (
        names == rf.models.list_models() == list(rf.models.resnet.BUILDERS) and json.loads(json.dumps(names)) == names
    )
    names.remove("resnet18")  # a list of one's own
    assert "resnet18" in rf.list_models() and {row.model for row in names.table} == set(names)
    assert " ".join(str(names).splitlines()[1].split()) == "resnet34 IMAGENET1K_V1 * 21.8 M 3.66 73.31 91.42 224 83"
    assert repr(names).startswith("['resnet34', ")


@pytest.mark.parametrize("name", rf.models.list_models())
def test_figures(name: str) -> None:
    """Parameters and operations are counted; accuracy is compared with torchvision's tables elsewhere."""
    rows = [row for row in rf.list_models().table if row.model == name]
    assert [row.weights for row in rows] == [member.name for member in rf.models.get_model_weights(name)]
    assert [row.weights for row in rows if row.default] == [rf.models.get_model_weights(name)["DEFAULT"].name]
    with torch.device("meta"):
        model, image = rf.models.get_model(name).eval(), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    for row in rows:
        assert row.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert row.gmacs == pytest.approx(counter.get_total_flops() / 2e9, abs=6e-4)
        assert row.image_size == rf.models.get_model_weights(name)[row.weights].transforms().crop_size[0]
        assert 0 < row.top1 < row.top5 < 100


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            app(["models", *arguments])
        assert not ended.value.code
        return capsys.readouterr().out

    assert run() == f"{rf.list_models()}\n"
    rows = json.loads(run("--json", "-"))
    assert len(rows) == 17 and rows[0]["model"] == "resnet18" and rows[0]["gmacs"] == 1.814
    run("--json", str(tmp_path / "models.json"))
    assert json.loads((tmp_path / "models.json").read_text()) == rows
