import pytest

from shared.core.messages import FailureCode, Sampling


@pytest.mark.parametrize("code", list(FailureCode))
def test_only_trouble_on_the_verifiers_side_may_pass(code: FailureCode) -> None:
    assert code.is_final is (code not in (FailureCode.INTERNAL, FailureCode.RESOURCE_EXHAUSTED))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(repetition_penalty=1.1), Sampling(presence_penalty=0.5), Sampling(frequency_penalty=-0.5)],
)
def test_each_penalty_makes_selection_depend_on_the_text(sampling: Sampling) -> None:
    assert sampling.has_penalties
    assert not Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1).has_penalties
