"""The thread that sends: it lives on after errors, and its end is waited for within bounds."""

import pytest
from tracking_tools import wait_until

from tt_ray.tracking.rounds import Rounds


def test_thread_outlives_what_nobody_foresaw(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = iter([KeyError("unforeseen"), LookupError("refused")])
    seen: list[Exception | None] = []

    def work() -> Exception | None:
        seen.append(rounds.problem)
        outcome = next(outcomes, None)
        if isinstance(outcome, KeyError):
            raise outcome
        return outcome

    rounds = Rounds(work, 0.01, "test")
    rounds.start()
    wait_until(lambda: len(seen) >= 3)
    assert rounds.close(10.0) is None
    assert [type(problem).__name__ for problem in seen[:3]] == ["NoneType", "KeyError", "LookupError"]
    assert [record.getMessage() for record in caplog.records] == [
        "results are not sent ('unforeseen'); trying again"
    ]


@pytest.mark.parametrize("moves", [True, False])
def test_close_is_patient_as_long_as_something_is_done(moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tt_ray.tracking.rounds.FINISHING_DELAY", 0.5)
    outcomes = iter([LookupError("refused") for _ in range(6)])

    def work() -> Exception | None:
        if moves:
            rounds.getting_on()
        return next(outcomes, None)

    rounds = Rounds(work, 60.0, "test")
    rounds.start()
    assert (rounds.close(1.5) is None) == moves
