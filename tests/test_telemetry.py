"""The meter: sums, sampling, warnings once, JSONL rows, tables."""

from __future__ import annotations

import json
import logging
import math
import threading
from pathlib import Path

import pytest

from commlib.scheme import Scheme
from commlib.telemetry import Meter, typical_error

INT4 = "int4:round=nearest"


def test_rows_sum_per_op_key_and_scheme() -> None:
    meter = Meter()
    meter.record("all_reduce", "w", INT4, 400, 60, 0.5)
    meter.record("all_reduce", "w", Scheme.parse(INT4), 400, 60, 0.25)
    meter.record("all_reduce", "v", INT4, 100, 100, 0.1)
    meter.record("all_gather", "w", INT4, 10, 5, 0.1)
    meter.record_error("w", INT4, 0.1)
    meter.record_error("w", INT4, 0.05)
    rows = meter.rows()
    assert [(r["op"], r["key"], r["calls"]) for r in rows] == [
        ("all_reduce", "w", 2),
        ("all_reduce", "v", 1),
        ("all_gather", "w", 1),
    ]
    assert rows[0] == {
        "op": "all_reduce",
        "key": "w",
        "scheme": INT4,
        "calls": 2,
        "raw_bytes": 800,
        "wire_bytes": 120,
        "ratio": pytest.approx(800 / 120),
        "seconds": pytest.approx(0.75),
        "rel_err": 0.05,
    }
    assert rows[1]["rel_err"] is None


def test_scalars_are_flat_numbers() -> None:
    meter = Meter()
    meter.record("all_reduce", "w", INT4, 400, 50, 0.5)
    meter.record("all_reduce", None, "fp32", 100, 150, 0.5)
    for scheme, error in (("int8", 0.01), (INT4, 0.3), ("int8", 0.02), (INT4, 0.1)):
        meter.record_error("w", scheme, error)
    meter.record_error("w", "int8", 0.03)  # the last, whichever came first
    meter.record_error(None, INT4, 0.2)
    meter.not_compressed("b", "float64")
    assert meter.scalars() == {
        "commlib/calls": 2.0,
        "commlib/raw_bytes": 500.0,
        "commlib/wire_bytes": 200.0,
        "commlib/seconds": 1.0,
        "commlib/ratio": 2.5,
        "commlib/rel_err/w": 0.03,
        "commlib/rel_err/(anonymous)": 0.2,
        "commlib/not_compressed": 1.0,
    }


def test_nothing_sent_has_a_ratio() -> None:
    meter = Meter()
    assert meter.scalars()["commlib/ratio"] == 1.0
    meter.record("all_reduce", "w", "fp32", 4, 0, 0.0)  # a group of one rank
    assert meter.rows()[0]["ratio"] == math.inf


def test_every_nth_message_of_a_key_is_due() -> None:
    meter = Meter(sample_every=3)
    assert [meter.due("a") for _ in range(7)] == [True, False, False, True, False, False, True]
    assert meter.due("b")


def test_gaussian_error_of_a_codec() -> None:
    # uniform quantizer, step m / 7 for the block's largest value m: rms error step / sqrt(12);
    # the largest of 128 Gaussian magnitudes is 2.9, root mean square
    assert typical_error(INT4) == pytest.approx(2.9 / 7 / math.sqrt(12), rel=0.1)
    assert typical_error("int8:round=nearest") < typical_error(INT4) / 12
    assert typical_error("fp32") == 0.0


def test_a_remarkable_error_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter()
    with caplog.at_level(logging.WARNING, logger="commlib"):
        meter.record_error("calm", INT4, 1.5 * typical_error(INT4))
        assert not caplog.records
        for _ in range(2):
            meter.record_error("wild", INT4, 3 * typical_error(INT4))
        assert len(caplog.records) == 1
        assert "wild" in caplog.text
        assert INT4 in caplog.text
        meter.record_error("wild", INT4, math.nan)
    assert len(caplog.records) == 1


def test_the_bound_can_be_given(caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter(warn_error=0.5)
    with caplog.at_level(logging.WARNING, logger="commlib"):
        meter.record_error("w", "int8:round=nearest", 0.4)
        assert not caplog.records
        meter.record_error("w", "int8:round=nearest", 0.6)
    assert "0.6" in caplog.text


def test_what_was_not_compressed_is_said_once_per_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    meter = Meter()
    with caplog.at_level(logging.WARNING, logger="commlib"):
        meter.not_compressed("a", "float64 travels raw")
        meter.not_compressed("a", "float64 travels raw")
        meter.not_compressed("b", "float64 travels raw")
        meter.not_compressed(None, "the payload would not be smaller")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("a is NOT compressed: float64 travels raw")
    assert said[1].startswith("an anonymous tensor is NOT compressed: the payload")
    assert "not compressed (2): float64 travels raw: a, b" in meter.table()


def test_other_ranks_count_and_stay_silent(caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter(rank=1)
    with caplog.at_level(logging.WARNING, logger="commlib"):
        meter.not_compressed("a", "float64")
    assert not caplog.records
    assert "float64: a" in meter.table()


def test_jsonl_rows(tmp_path: Path) -> None:
    meter = Meter(tmp_path / "logs" / "rank{rank}.jsonl", rank=3)
    meter.record("all_reduce", None, INT4, 400, 60, 0.5)
    meter.record_error("w", INT4, math.inf)
    path = tmp_path / "logs" / "rank3.jsonl"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    meter.close()
    assert first.pop("time") > 0
    assert first == {
        "rank": 3,
        "op": "all_reduce",
        "key": None,
        "scheme": INT4,
        "raw_bytes": 400,
        "wire_bytes": 60,
        "seconds": 0.5,
    }
    assert second["rel_err"] is None  # JSON has no infinity
    meter.record("all_reduce", "w", INT4, 1, 1, 0.0)  # reopens
    meter.close()
    assert len(path.read_text().splitlines()) == 3


def test_the_table_shows_the_heaviest_rows_and_says_what_it_left_out() -> None:
    meter = Meter()
    for place in range(5):
        meter.record("all_reduce", f"p{place}", INT4, 10**6, place * 10**5 + 1, 0.004)
        meter.record_error(f"p{place}", INT4, place / 100)
    table = meter.table(top=2)
    traffic, rest = table.split("... and 3 more rows")
    assert traffic.index("p4") < traffic.index("p3")
    assert "p2" not in traffic
    assert rest.index("p4") < rest.index("p3")
    assert "p2" not in rest


def test_reset_forgets(caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter()
    meter.record("all_reduce", "w", INT4, 1, 1, 0.0)
    meter.not_compressed("a", "float64")
    meter.due("w")
    meter.reset()
    caplog.clear()
    assert meter.rows() == []
    assert meter.due("w")
    with caplog.at_level(logging.WARNING, logger="commlib"):
        meter.not_compressed("a", "float64")
    assert len(caplog.records) == 1


def test_threads_lose_no_count() -> None:
    meter = Meter()

    def work() -> None:
        for _ in range(2000):
            meter.record("all_reduce", "w", "fp32", 3, 2, 0.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.rows()[0]["calls"] == 8000
    assert meter.rows()[0]["wire_bytes"] == 16000


@pytest.mark.parametrize(
    ("options", "match"),
    [({"sample_every": 0}, "sample_every is 0"), ({"warn_error": 0.0}, "warn_error is 0")],
)
def test_bad_options(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Meter(**options)  # type: ignore[arg-type]
