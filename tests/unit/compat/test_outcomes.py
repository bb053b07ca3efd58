"""Comparing how the tests of a suite ended on two sides."""

from __future__ import annotations

from pathlib import Path

from tests.compat.outcomes import Known, Outcome, Result, compare, known_differences, totals
from tests.compat.pytest_run import read_report

PASSED, FAILED = Result(Outcome.PASSED), Result(Outcome.FAILED)


def test_a_test_that_ends_otherwise_is_a_difference() -> None:
    (difference,) = compare("s", [{"a": PASSED, "b": FAILED}], [{"a": FAILED, "b": FAILED}], [])
    assert (difference.test, difference.reason) == ("a", "")


def test_a_test_that_ran_on_one_side_only_is_a_difference() -> None:
    (difference,) = compare("s", [{"a": PASSED}], [{}], [])
    assert difference.gateway.outcome is Outcome.ABSENT


def test_other_output_is_a_difference_though_both_pass() -> None:
    assert compare("s", [{"a": Result(Outcome.PASSED, "1")}], [{"a": Result(Outcome.PASSED, "2")}], [])


def test_a_test_that_is_unsteady_on_one_side_is_no_difference() -> None:
    assert not compare("s", [{"a": PASSED}, {"a": FAILED}], [{"a": FAILED}, {"a": FAILED}], [])


def test_a_known_difference_carries_its_reason_for_its_suite_only() -> None:
    known = [Known("s", "a*", "because")]
    assert compare("s", [{"a1": PASSED}], [{"a1": FAILED}], known)[0].reason == "because"
    assert compare("t", [{"a1": PASSED}], [{"a1": FAILED}], known)[0].reason == ""


def test_every_committed_difference_has_a_reason() -> None:
    assert all(known.reason for known in known_differences())


def test_a_report_of_pytest_is_read(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="m" name="a"/>'
        '<testcase classname="m" name="b"><failure message="no"/></testcase>'
        '<testcase classname="m" name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    found = read_report(report)
    assert {name: result.outcome for name, result in found.items()} == {
        "m::a": Outcome.PASSED,
        "m::b": Outcome.FAILED,
        "m::c": Outcome.SKIPPED,
    }
    assert totals(found) == "1 passed, 1 failed, 1 skipped"
