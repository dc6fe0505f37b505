"""Rates, their intervals, and the file of finished episodes."""

from __future__ import annotations

import json

import pytest

from pizero.agent.driving.episodes import EpisodeLog, EpisodeResult, fingerprint
from pizero.agent.driving.scores import rate, summarise, wilson


def result(task="push", start=0, *, arm="trained", any_=True, end=True, named=None, **changes):
    values = {
        "arm": arm,
        "task": task,
        "start": start,
        "text": "push it",
        "steps": 10,
        "decisions": 5,
        "success": {"any": any_, "end": end},
        "first_success": 4 if any_ else None,
        "goals": {},
        "named_task": None if named is None else "pull",
        "named_success": None if named is None else {"any": named, "end": named},
        "seconds": 0.5,
    }
    return EpisodeResult(**(values | changes))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_agrees_with_newcombe(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_narrows():
    low, high = wilson(3, 20)
    assert wilson(17, 20) == pytest.approx((1 - high, 1 - low))
    assert wilson(30, 200)[1] - wilson(30, 200)[0] < high - low
    wide = wilson(3, 20, confidence=0.99)
    assert wide[0] < low < high < wide[1]


def test_wilson_refuses_nonsense():
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="at least one trial"):
        rate([])
    with pytest.raises(ValueError, match=r"between 0 and 1, got 95"):
        wilson(1, 2, confidence=95)


def test_summary_keeps_both_rules_and_both_goals():
    results = [
        result(start=0),
        result(start=1, end=False),
        result("pull", any_=False, end=False),
        result(arm="swapped", any_=False, end=False, named=True),
        result(arm="swapped", start=1, any_=True, named=False),
    ]
    arms = summarise(results, headline="end")
    assert arms["trained"]["tasks"]["push"]["any"]["successes"] == 2
    assert arms["trained"]["tasks"]["push"]["success"]["successes"] == 1
    assert arms["trained"]["success"]["trials"] == 3
    assert arms["trained"]["tasks"]["pull"]["mean_steps_to_success"] is None
    assert "named" not in arms["trained"]
    assert arms["swapped"]["named"]["rate"] == 0.5
    assert arms["swapped"]["success"]["rate"] == 0.5
    with pytest.raises(ValueError, match="got 'best'"):
        summarise(results, headline="best")


def test_log_survives_a_torn_line(tmp_path):
    path = tmp_path / "episodes.jsonl"
    log = EpisodeLog(path, protocol={"seed": 1})
    log.append(result(start=0))
    log.append(result(start=1, any_=False))
    whole = path.read_text()
    path.write_text(whole + '{"arm": "trained", "ta')
    again = EpisodeLog(path, protocol={"seed": 1})
    assert list(again.results.values()) == [result(start=0), result(start=1, any_=False)]
    assert path.read_text() == whole
    again.append(result(start=2))
    assert len(EpisodeLog(path, protocol={"seed": 1}).results) == 3


def test_log_refuses_another_protocol_and_shows_both(tmp_path):
    path = tmp_path / "episodes.jsonl"
    ours = {"act_steps": 2, "arms": {"trained": {"starts": 20}}, "seed": 0}
    EpisodeLog(path, protocol=ours).append(result())
    theirs = {"act_steps": 4, "arms": {"trained": {"starts": 20}}}
    with pytest.raises(ValueError, match="must not be mixed") as refusal:
        EpisodeLog(path, protocol=theirs)
    message = str(refusal.value)
    assert fingerprint(ours) in message
    assert fingerprint(theirs) in message
    assert "act_steps: 2 there, 4 here" in message
    assert "seed: 0 there, absent here" in message
    assert "starts" not in message
    assert len(path.read_text().splitlines()) == 2


def test_a_log_without_episodes_may_change_its_protocol(tmp_path):
    path = tmp_path / "episodes.jsonl"
    EpisodeLog(path, protocol={"act_steps": 9})
    EpisodeLog(path, protocol={"act_steps": 2}).append(result())
    assert list(EpisodeLog(path, protocol={"act_steps": 2}).results) == ["trained/push/0"]


def test_fingerprint_ignores_the_order_of_keys():
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_an_empty_file_is_a_new_log(tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_text("")
    EpisodeLog(path, protocol={"seed": 1})
    assert json.loads(path.read_text())["protocol"] == {"seed": 1}
