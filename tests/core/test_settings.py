import pytest

from shared.core.messages import Finish, Open, Sampling, Want
from shared.core.settings import Request
from shared.core.tokens import TokenLog
from shared.testing.engines import TOY_VOCABULARY

REQUEST = Request(
    session_id="s",
    prompt=(1, 0),
    max_new_tokens=3,
    vocabulary=TOY_VOCABULARY,
    sampling=Sampling(temperature=1.0, seed=4),
    stop_ids=frozenset((0,)),
    want=Want.STREAM,
)


@pytest.mark.parametrize(
    ("text", "finish"),
    [
        ((), Finish.NONE),
        ((5,), Finish.NONE),
        ((5, 0), Finish.STOP),
        ((5, 6, 7), Finish.LENGTH),
        ((5, 6, 0), Finish.STOP),
    ],
)
def test_text_ends_at_a_stop_token_of_its_own_or_at_the_limit(text: tuple[int, ...], finish: Finish) -> None:
    assert REQUEST.ending(TokenLog(REQUEST.prompt + text)) is finish
    assert REQUEST.limit == 5


def test_open_hands_over_what_the_verifier_does_not_know() -> None:
    log = TokenLog((1, 0, 5, 6))
    assert REQUEST.open(log, known_len=2, opened_len=3) == Open(
        session_id="s",
        tokens=(5,),
        prompt_len=2,
        max_new_tokens=3,
        vocabulary=TOY_VOCABULARY,
        sampling=Sampling(temperature=1.0, seed=4),
        stop_ids=frozenset((0,)),
        want=Want.STREAM,
        known_len=2,
        known_hash=log.hash_at(2),
    )
