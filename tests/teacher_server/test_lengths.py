"""What the service expects of completions follows what they turn out to be."""

from protos.scores import Mode
from teacher_server.lengths import Lengths


def test_until_something_has_ended_every_completion_is_expected_to_fill_its_room() -> None:
    assert Lengths().expected(Mode.THINKING, 1000) == 1000


def test_expectations_approach_the_mean_share_of_each_mode() -> None:
    lengths = Lengths()
    for i in range(400):
        lengths.observe(Mode.THINKING, 600 + 200 * (i % 2), 1000)
        lengths.observe(Mode.NON_THINKING, 1, 1000)
    assert abs(lengths.expected(Mode.THINKING, 100) - 70) <= 2
    assert lengths.expected(Mode.NON_THINKING, 1000) <= 2
    assert lengths.expected(Mode.NON_THINKING, 10) == 1
    assert lengths.expected(None, 50) == 50
