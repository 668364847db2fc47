"""The demonstration, cut short: without training it must find nothing, and say so."""

import json

import pytest

from contnet.demo import REQUIRED_AP, main


@pytest.mark.slow
def test_an_untrained_detector_fails_the_demonstration(tmp_path, capsys):
    status = main(["--output", str(tmp_path), "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()"])
    printed = capsys.readouterr()
    *_, ap_line, page_line = printed.out.strip().splitlines()
    assert ap_line.startswith("box AP ")
    assert 0 <= float(ap_line.removeprefix("box AP ")) < 1 < REQUIRED_AP
    assert page_line == f"page {tmp_path / 'report.html'}"
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert status == 1
    assert "box AP is below 60" in printed.err
    (record,) = json.loads((tmp_path / "run" / "results.json").read_text())
    assert record["iteration"] == 0 and record["metrics"]["bbox"]["AP"] < 1
