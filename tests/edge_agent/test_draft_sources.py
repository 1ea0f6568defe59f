from edge_agent.draft_sources import DraftSources


def test_each_source_is_judged_apart() -> None:
    sources = DraftSources()
    sources.drafted(10, (1, 2, 3, 4), ("ngram", "ngram", "model", "ngram"))
    sources.committed(10, (1, 2))
    sources.committed(12, (3, 9))
    assert sources.report() == {
        "model": {"num_draft_tokens": 1, "num_accepted_tokens": 1, "acceptance_rate": 1.0},
        "ngram": {"num_draft_tokens": 3, "num_accepted_tokens": 2, "acceptance_rate": 0.6667},
    }


def test_what_follows_a_wrong_token_is_not_judged() -> None:
    sources = DraftSources()
    sources.drafted(10, (1, 2, 3), ("model",) * 3)
    sources.committed(10, (9, 2, 3))
    assert sources.report()["model"]["num_draft_tokens"] == 1


def test_what_is_drafted_anew_replaces_what_was() -> None:
    sources = DraftSources()
    sources.drafted(10, (1, 2, 3), ("ngram",) * 3)
    sources.drafted(11, (5,), ("model",))
    sources.committed(10, (1, 5, 3))
    counts = {
        source: (found["num_accepted_tokens"], found["num_draft_tokens"]) for source, found in sources.report().items()
    }
    assert counts == {"ngram": (1, 1), "model": (1, 1)}


def test_tokens_that_nobody_drafted_count_for_nobody() -> None:
    sources = DraftSources()
    sources.committed(3, (1, 2))
    assert sources.report() == {}
