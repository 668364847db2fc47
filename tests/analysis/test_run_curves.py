"""Tests the curves of runs, and the table of their values."""

import pytest

from contnet.analysis.runs import RunRecord, curve_sections
from contnet.evaluation.metrics import MAIN_METRICS


@pytest.mark.parametrize("metric", MAIN_METRICS)
@pytest.mark.parametrize("prefix", ["", "val/"])
def test_a_shortened_table_has_all_evaluations(metric, prefix):
    lines = [{"iteration": i, "total_loss": 1.0} for i in range(3000)]
    lines[1001][prefix + metric] = 50.0
    (curves,) = curve_sections([RunRecord("run", lines, [])])
    rows = dict(curves.rows)
    assert len(rows) < 1100 and {0, 2999} < rows.keys()
    assert rows[1001][prefix + metric] == 50.0
