import pytest
from benchmarks.capacity import require_steps
from benchmarks.processes import BenchError


def test_edges_that_starve_each_other_are_an_error_that_says_so() -> None:
    """It was a KeyError, after minutes, on a machine where 256 edges in one process lost the verifier together."""
    with pytest.raises(BenchError, match="no step for 256 edges, whose one core was 100% busy; give fewer --sessions"):
        require_steps({"steps": 0}, 256, 0.999)
    require_steps({"steps": 3}, 256, 0.999)
