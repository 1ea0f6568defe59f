"""Chain or tree: which siblings of its drafted tokens the edge sends along.

A sibling is the draft's next choice for a position, at hand with no further forward. If the target takes it, the step
commits one token more than the chain would have. So its worth is the chance of that: that the path before it is right,
the tokens ranked before it are wrong, and it is right (each learnt from what was committed, `PathSiblings.choose`),
times how often a sibling that was right had a row in its step, for a verifier may have better use for its rows. Its
price is its bytes, about four: a chain token has as many, so it must be worth as much as the last one that run-ahead
still drafts. A row costs the verifier, which sees to it by itself: it takes the best ones, chain tokens and siblings
alike, as many as pay.

So there is no flag. A good draft sends a chain, and a sibling where it is in doubt, for one is seldom right where its
first choice nearly always is. A weak draft sends a tree. Where the verifier's rows are all worth more, siblings cease.

A good draft (`CHAIN_ACCEPTANCE`) keeps to the budget of bytes a token, which is made for chains: at the weak one's
price it sent 17.8 bytes a token at 50 ms (ONNX, 41 steps a second), of which siblings were 2.7, and was no faster.

Deeper branches are not drafted. On a draft that is right 45 times in 100 (SmolLM2 without three layers, temperature 1)
four, eight and sixteen rows committed 1.75 tokens as the best chain, 1.92, 2.18 and 2.34 as a chain with siblings, and
1.96, 2.29 and 2.29 as the best tree that can be grown, which takes 1.4 to 2.7 times the forwards on the edge. Nor does
a good draft gain by them, although its second choice is nearly always right where the first is not (see CHANGELOG).
"""

LEAST_WORTH = 0.03  # DySpec (arXiv 2410.11744) stops growing a tree by such a threshold
CHAIN_WORTH = 0.08  # of a draft whose chain is what counts: one that is right more often than
CHAIN_ACCEPTANCE = 0.85


def sibling_price(draft_duty: float, acceptance: float) -> float:
    """The least worth of a sibling that is sent.

    The device is willing to draft this part of its time; its draft is accepted with this probability a token.
    """
    return max(1.0 - draft_duty, CHAIN_WORTH if acceptance >= CHAIN_ACCEPTANCE else LEAST_WORTH)
