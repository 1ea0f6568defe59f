"""The emulated target of load tests, by its roofline: a 70B model in FP8 on one device of an H100's speed.

    weights   70 GB / (3.35 TB/s x 0.6 reached)                               = 35 ms a step
    compute   2 x 70e9 FLOP / (1979 TFLOP/s x 0.6 reached)                    = 0.118 ms a row
    cache     1,000 tokens of 80 layers x 8 heads x 128 x 2 in 16 bits, read  = 0.16 ms a session
    launch    and what else a step has                                        = 2 ms a step

Weights are read while rows are computed: the longer of the two counts. Whether 256 such caches would fit into one
device's memory is not part of it.
"""

LABEL = "emulated: 70B in FP8 at an H100's bandwidth and compute, texts and drafts recorded from SmolLM2-135M"
_WEIGHTS_MS, _ROW_MS, _SESSION_MS, _LAUNCH_MS = 35.0, 0.118, 0.16, 2.0


def step_ms(rows: int, sessions: int) -> float:
    """How long a forward takes, ms."""
    return max(_WEIGHTS_MS, _ROW_MS * rows) + _SESSION_MS * sessions + _LAUNCH_MS
