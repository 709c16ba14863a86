"""docs/adopt.md: every family's section runs as it stands, and says the truth about its numbers."""

import re
from pathlib import Path

import pytest
import torch

import mhc

PAGE = (Path(__file__).parents[1] / "docs" / "adopt.md").read_text(encoding="utf-8")
SECTIONS = dict(
    re.findall(r"^## ([\w.-]+)\n(?:(?!^##).)*?^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
)


def test_every_family_has_a_section():
    assert list(SECTIONS) == ["DeepSeek-V4", "GLM-5.3", "Hunyuan-V4", "Hunyuan-V4-VL"]


@pytest.mark.filterwarnings("ignore")  # transformers' and its libraries' own
@pytest.mark.parametrize("family", SECTIONS)
def test_a_section_runs_as_it_stands(family, capsys):
    pytest.importorskip("transformers", minversion="5.24", reason="transformers is not installed")
    torch.manual_seed(0)
    names = {}
    with mhc.using(mhc.Kernels.reference()):
        exec(SECTIONS[family], names)
        report = mhc.kernel_report()
    before, after = names["before"], names["after"]
    assert (after.logits - before.logits).abs().max() <= 3e-6 * before.logits.abs().max()
    steps = {row.op for row in report if row.op.startswith("step")}
    ending = "_identity" if family.startswith("Hunyuan") else ""
    assert steps == {f"step_norm{ending}"} | ({f"step{ending}"} if family != "GLM-5.3" else set()), "and a learned head"
    assert str(report) in capsys.readouterr().out
    assert all(parameter.grad is not None for name, parameter in names["model"].named_parameters() if "_hc.fn" in name)
