"""The recorded timeline of a pipeline, small."""

import json

import pytest

from mhc.examples import pipeline_trace

SMALL = ["--layers=2", "--width=16", "--streams=2", "--tokens=8", "--microbatches=4"]


def test_a_timeline_is_written_and_overlapping_changes_no_loss(tmp_path, capsys):
    said = []
    for extra in ([], ["--plain"]):
        out = tmp_path / f"trace{len(said)}.json"
        assert pipeline_trace.main([*SMALL, *extra, "--out", str(out)]) == 0
        names = [event.get("name", "") for event in json.loads(out.read_text())["traceEvents"]]
        assert sum(name.endswith("OVERLAP_F_B") for name in names) == 5
        assert names.count("step") == 1
        said.append(capsys.readouterr().out.split("loss ")[1])
    assert float(said[0]) > 0
    assert said[0] == said[1]


def test_bad_input_is_one_line_and_exit_code_2(capsys):
    assert pipeline_trace.main([*SMALL, "--width=12"]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "12" in captured.err
    with pytest.raises(SystemExit):
        pipeline_trace.main(["--nothing"])
