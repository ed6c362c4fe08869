"""Which of several ranks that ended is named: the one that ended the others."""

import signal

import pytest
from torch.distributed.elastic.multiprocessing import ProcessFailure

from megatron_ext.runtime.launch import first_to_fail, how_it_ended


@pytest.mark.parametrize(
    ("codes", "first"),
    [
        ({0: 1, 1: -signal.SIGKILL}, 1),  # rank 0 lost its connection to it
        ({0: 2, 1: -signal.SIGSEGV}, 1),
        ({0: -signal.SIGTERM, 1: 1}, 1),  # ended by the launcher
        ({0: 143, 1: 1}, 1),  # ended by the launcher, in its own time
        ({0: 1, 1: 2}, 1),  # bad input, which it said
        ({0: -signal.SIGTERM, 1: 143}, 1),
        ({0: 1, 1: 1}, 0),
    ],
)
def test_the_rank_that_ended_the_others_comes_first(codes: dict[int, int], first: int) -> None:
    failures = {rank: ProcessFailure(rank, 100 + rank, code, "") for rank, code in codes.items()}
    for failure in failures.values():
        failure.timestamp = 0
    rank, failure = first_to_fail(failures)
    assert (rank, failure.exitcode) == (first, codes[first])


def test_a_rank_that_spoke_for_itself_is_not_described() -> None:
    codes = (2, 130, 143, 1, -signal.SIGKILL)
    said = [how_it_ended(ProcessFailure(0, 7, code, "")) for code in codes]
    assert said[:4] == [None, None, None, "ended with exit code 1; why, stands above"]
    assert str(said[4]).startswith("was killed by SIGKILL: often memory ran out")
