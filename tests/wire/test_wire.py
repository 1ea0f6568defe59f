import math
from enum import Enum

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared import wire
from shared.core.errors import RemoteProtocolError
from shared.core.messages import (
    Close,
    CloudMessage,
    Commit,
    Draft,
    EdgeMessage,
    Failure,
    FailureCode,
    Fingerprint,
    Finish,
    Heartbeat,
    NeedTokens,
    Open,
    Sampling,
    SessionStatus,
    Want,
)
from shared.pb import speculation_pb2 as pb
from shared.wire import Description, SessionList

untimed = settings(deadline=None)  # a busy machine is no failure

INT = st.integers(0, 2**31 - 1)
HASH = st.integers(0, 2**61 - 2)
TOKENS = st.lists(INT, max_size=20).map(tuple)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
FINGERPRINT = st.builds(Fingerprint, st.integers(1, 2**31 - 1), st.binary(min_size=1, max_size=64))
SAMPLING = st.builds(
    Sampling,
    temperature=st.floats(0, 1e300),
    top_k=INT,
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 1e300, exclude_min=True),
    presence_penalty=FINITE,
    frequency_penalty=FINITE,
    seed=st.integers(0, 2**64 - 1),
)
SESSION_ID = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=128)
HEARTBEAT = st.builds(
    Heartbeat, st.integers(0, 2**64 - 1), INT, st.floats(0, 2.0**100, width=32), st.floats(0, 2.0**100, width=32), INT
)
UINT32 = st.integers(0, 2**32 - 1)
FLOAT32 = st.floats(0, 2.0**100, width=32)


@st.composite
def statuses(draw: st.DrawFn) -> SessionStatus:
    num_drafted = draw(UINT32)
    return SessionStatus(
        session=draw(st.text()),
        state=draw(st.sampled_from(["prefill", "waiting", "ready", "stepping", "finished"])),
        want=draw(st.sampled_from(Want)),
        prompt_len=draw(UINT32),
        committed_len=draw(UINT32),
        cached_len=draw(UINT32),
        pending_tokens=draw(UINT32),
        num_steps=draw(UINT32),
        num_drafted=num_drafted,
        num_accepted=draw(st.integers(0, num_drafted)),
        goodput=draw(FLOAT32),
        draft_ms=draw(FLOAT32),
        silent_ms=draw(FLOAT32),
    )


@st.composite
def opens(draw: st.DrawFn) -> Open:
    known_len = draw(st.integers(0, wire.MAX_SESSION_TOKENS - 20))
    tokens = draw(st.lists(INT, min_size=0 if known_len else 1, max_size=20))
    return Open(
        session_id=draw(SESSION_ID),
        tokens=tuple(tokens),
        prompt_len=draw(st.integers(1, known_len + len(tokens))),
        max_new_tokens=draw(INT),
        vocabulary=draw(FINGERPRINT),
        sampling=draw(SAMPLING | st.just(Sampling())),
        stop_ids=draw(st.frozensets(INT, max_size=5)),
        want=draw(st.sampled_from(Want)),
        known_len=known_len,
        known_hash=draw(HASH),
        protocol=draw(INT),
    )


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    tokens = draw(st.lists(INT, min_size=1, max_size=20))
    confidence = draw(st.just(b"") | st.binary(min_size=len(tokens), max_size=len(tokens)))
    split = draw(st.integers(0, len(tokens)))
    parents = tuple(draw(st.integers(-1, index - 1)) for index in range(split, len(tokens)))
    return Draft(draw(INT), draw(HASH), tuple(tokens), confidence, parents)


@st.composite
def commits(draw: st.DrawFn) -> Commit:
    tokens = draw(TOKENS)
    num_drafted = draw(INT)
    return Commit(
        start=draw(INT),
        tokens=tokens,
        num_drafted=num_drafted,
        num_accepted=draw(st.integers(0, min(num_drafted, len(tokens)))),
        finish=draw(st.sampled_from(Finish)),
        queue_ms=draw(st.floats(0, 1e6)),
        verify_ms=draw(st.floats(0, 1e6)),
        max_ahead=draw(INT),
        hold_tokens=draw(INT),
        is_holding=draw(st.booleans()),
        num_recycled=draw(st.integers(0, 0 if num_drafted else len(tokens))),
        next_rows=draw(st.none() | INT),
        step_ms=tuple(draw(st.lists(FLOAT32.filter(bool), max_size=3))),
    )


@untimed
@given(opens() | drafts() | HEARTBEAT | st.builds(Close, st.text()))
def test_edge_message_comes_back_equal(message: EdgeMessage) -> None:
    encoded = wire.edge_to_wire(message).SerializeToString()
    assert wire.edge_from_wire(pb.EdgeMessage.FromString(encoded)) == message


@untimed
@given(
    st.just(NeedTokens())
    | HEARTBEAT
    | st.builds(Failure, st.sampled_from(FailureCode), st.text(), st.integers(0, 2**32 - 1))
)
def test_cloud_message_comes_back_equal(message: CloudMessage) -> None:
    encoded = wire.cloud_to_wire(message).SerializeToString()
    assert wire.cloud_from_wire(pb.CloudMessage.FromString(encoded)) == message


@untimed
@given(commits())
def test_commit_comes_back_with_whole_milliseconds(commit: Commit) -> None:
    back = wire.cloud_from_wire(pb.CloudMessage.FromString(wire.cloud_to_wire(commit).SerializeToString()))
    assert isinstance(back, Commit)
    assert (back.queue_ms, back.verify_ms) == (round(commit.queue_ms), round(commit.verify_ms))
    assert wire.cloud_to_wire(back) == wire.cloud_to_wire(commit)
    assert (back.start, back.tokens, back.finish) == (commit.start, commit.tokens, commit.finish)
    assert (back.num_drafted, back.num_accepted) == (commit.num_drafted, commit.num_accepted)
    assert (back.max_ahead, back.hold_tokens) == (commit.max_ahead, commit.hold_tokens)
    assert back.is_holding is commit.is_holding


@untimed
@given(
    st.builds(
        Description,
        st.text(),
        FINGERPRINT,
        st.integers(1, 2**31 - 1),
        st.text(),
        st.text(),
        INT,
        INT,
        step_ms=st.lists(FLOAT32.filter(bool), max_size=3).map(tuple),
    )
)
def test_description_comes_back_equal(description: Description) -> None:
    encoded = wire.description_to_wire(description).SerializeToString()
    assert wire.description_from_wire(pb.Description.FromString(encoded)) == description


def test_description_with_its_vocabulary_comes_back_equal() -> None:
    description = Description("m", Fingerprint(3, b"d"), 512, "float32", "torch", 8, 64, (b"a", b"", b"\xff"))
    assert wire.description_from_wire(wire.description_to_wire(description)) == description


@untimed
@given(st.builds(SessionList, st.lists(statuses(), max_size=4).map(tuple), UINT32, UINT32, UINT32))
def test_session_list_comes_back_equal(listed: SessionList) -> None:
    encoded = wire.session_list_to_wire(listed).SerializeToString()
    assert wire.session_list_from_wire(pb.SessionList.FromString(encoded)) == listed


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"want": 0}, "SessionStatus.want is 0"),
        ({"num_drafted": 2, "num_accepted": 3}, "3 tokens accepted of 2 drafted"),
        ({"goodput": math.nan}, "SessionStatus.goodput is nan"),
        ({"draft_ms": -1.0}, "SessionStatus.draft_ms is -1.0"),
        ({"silent_ms": math.inf}, "SessionStatus.silent_ms is inf"),
    ],
)
def test_malformed_session_list_is_refused(changes: dict[str, object], reason: str) -> None:
    status = pb.SessionStatus(**{"session": "/s", "state": "ready", "want": 1, **changes})  # type: ignore[arg-type]  # any by name
    with pytest.raises(RemoteProtocolError, match=reason):
        wire.session_list_from_wire(pb.SessionList(sessions=[status]))


def test_draft_ms_is_rounded_to_float32() -> None:
    back = wire.edge_from_wire(wire.edge_to_wire(Heartbeat(1, 2, 12.3)))
    assert isinstance(back, Heartbeat)
    assert back.draft_ms == pytest.approx(12.3, rel=2**-23)


def test_sampling_left_out_is_greedy_with_filters_off() -> None:
    message = _open()
    message.ClearField("sampling")
    opened = wire.edge_from_wire(pb.EdgeMessage(open=message))
    assert isinstance(opened, Open)
    assert opened.sampling == Sampling()


@untimed
@given(st.binary(max_size=60))
@example(pb.EdgeMessage(open=pb.Open()).SerializeToString())
def test_whatever_bytes_come_are_refused_or_survive_the_way_back(received: bytes) -> None:
    try:
        message = wire.edge_from_wire(pb.EdgeMessage.FromString(received))
    except (DecodeError, RemoteProtocolError):
        return
    assert wire.edge_from_wire(wire.edge_to_wire(message)) == message


@pytest.mark.parametrize(("kind", "twin"), [(Want, pb.Want), (Finish, pb.Finish), (FailureCode, pb.FailureCode)])
def test_enums_have_the_names_and_numbers_of_their_twins(kind: type[Enum], twin: type[pb.Want]) -> None:
    prefix = {Want: "WANT", Finish: "FINISH", FailureCode: "FAILURE_CODE"}[kind]
    ours = {f"{prefix}_{member.name}": member.value for member in kind}
    assert ours == {name: number for name, number in twin.items() if not name.endswith("_UNSPECIFIED")}


def test_a_number_that_does_not_fit_is_our_bug() -> None:
    with pytest.raises(ValueError, match="out of range"):
        wire.edge_to_wire(Draft(start=-1, parent_hash=0, tokens=(1,)))


def _open(**changes: object) -> pb.Open:
    fields: dict[str, object] = {
        "protocol": 1,
        "session_id": "s-1",
        "tokens": [1, 2, 3],
        "prompt_len": 3,
        "max_new_tokens": 8,
        "vocabulary": pb.Fingerprint(size=100, digest=b"digest"),
        "want": pb.WANT_SPECULATE,
    }
    return pb.Open(**{**fields, **changes})  # type: ignore[arg-type]  # any field by name


def _sampling(**changes: float) -> pb.Open:
    return _open(sampling=pb.Sampling(**changes))  # type: ignore[arg-type]  # any field by name


TOO_LONG = wire.MAX_SESSION_TOKENS + 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (_open(session_id=""), "session_id"),
        (_open(session_id="x" * 129), "session_id"),
        (_open(session_id="zoë"), "session_id"),
        (_open(session_id="a\nb"), "session_id"),
        (_open(tokens=[0] * TOO_LONG), "at most 1048576"),
        (_open(known_len=2**32 - 1), "at most 1048576"),
        (_open(tokens=[1, 2, 2**31]), r"tokens has a token id that is negative or not below 2\^31"),
        (_open(prompt_len=0), "prompt_len is 0"),
        (_open(prompt_len=4), "prompt_len is 4, not 1 to its 3 tokens"),
        (_open(tokens=[], prompt_len=0), "prompt_len is 0, not 1 to its 0 tokens"),
        (_open(max_new_tokens=2**31), "max_new_tokens"),
        (_open(vocabulary=None), "vocabulary.digest has 0 bytes"),
        (_open(vocabulary=pb.Fingerprint(size=1, digest=b"x" * 65)), "vocabulary.digest has 65 bytes"),
        (_open(vocabulary=pb.Fingerprint(size=0, digest=b"x")), "vocabulary.size is 0"),
        (_open(stop_ids=[2**31]), "stop_ids"),
        (_open(stop_ids=[1] * 4097), "stop_ids has 4097 tokens; at most 4096"),
        (_open(want=0), "want is 0"),
        (_open(want=9), "want is 9"),
        (_open(known_hash=2**61 - 1), "known_hash"),
        (_sampling(temperature=math.nan), "temperature"),
        (_sampling(temperature=math.inf), "temperature"),
        (_sampling(temperature=-0.1), "temperature"),
        (_sampling(top_k=2**31), "top_k"),
        (_sampling(top_p=0), "top_p"),
        (_sampling(top_p=1.01), "top_p"),
        (_sampling(top_p=math.nan), "top_p"),
        (_sampling(min_p=-0.1), "min_p"),
        (_sampling(min_p=1.1), "min_p"),
        (_sampling(min_p=math.nan), "min_p"),
        (_sampling(repetition_penalty=0), "repetition_penalty"),
        (_sampling(repetition_penalty=math.inf), "repetition_penalty"),
        (_sampling(repetition_penalty=math.nan), "repetition_penalty"),
        (_sampling(presence_penalty=math.nan), "presence_penalty"),
        (_sampling(frequency_penalty=-math.inf), "frequency_penalty"),
        (pb.Draft(start=3), "no tokens"),
        (pb.Draft(tokens=[1] * 4097), "at most 4096"),
        (pb.Draft(tokens=[2**32 - 1]), "token id"),
        (pb.Draft(tokens=[1, 2], confidence=b"\x00"), "1 bytes for 2 tokens"),
        (pb.Draft(tokens=[1], start=2**31), "start"),
        (pb.Draft(tokens=[1], parents=[0, 1]), "2 parents for 1 tokens"),
        (pb.Draft(tokens=[1, 2, 3], parents=[0, 3]), "does not come before its child"),
        (pb.Draft(tokens=[1, 2], parents=[1, 0]), "does not come before its child"),
        (pb.Draft(tokens=[1], parent_hash=2**61 - 1), "parent_hash"),
        (pb.Heartbeat(draft_ms=math.nan), "draft_ms"),
        (pb.Heartbeat(draft_ms=math.inf), "draft_ms"),
        (pb.Heartbeat(draft_ms=-1), "draft_ms"),
        (pb.Heartbeat(rtt_ms=-1), "rtt_ms"),
        (pb.Heartbeat(rtt_ms=math.nan), "rtt_ms"),
        (pb.Heartbeat(committed_len=2**31), "committed_len"),
        (None, "no kind"),
    ],
)
def test_malformed_edge_message_is_refused(message: pb.Open | pb.Draft | pb.Heartbeat | None, reason: str) -> None:
    received = pb.EdgeMessage()
    if message is not None:
        getattr(received, type(message).__name__.lower()).MergeFrom(message)
    with pytest.raises(RemoteProtocolError, match=reason) as refused:
        wire.edge_from_wire(received)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (pb.Commit(start=2**31), "start"),
        (pb.Commit(tokens=[2**31]), "token id"),
        (pb.Commit(tokens=[0] * TOO_LONG), "at most 1048576"),
        (pb.Commit(tokens=[1, 2], num_drafted=1, num_accepted=2), "num_accepted is 2 of 1 drafted"),
        (pb.Commit(tokens=[1], num_drafted=2, num_accepted=2), "num_accepted is 2 of 2 drafted, with 1 tokens"),
        (pb.Commit(tokens=[1], num_recycled=2), "num_recycled is 2, with 1 tokens and 0 drafted"),
        (pb.Commit(tokens=[1, 2], num_drafted=1, num_recycled=1), "num_recycled is 1, with 2 tokens and 1 drafted"),
        (pb.Commit(num_drafted=2**31), "num_drafted"),
        (pb.Commit(max_ahead=2**31), "max_ahead"),
        (pb.Commit(hold_tokens=2**31), "hold_tokens"),
        (pb.Commit(next_rows=2**31), "next_rows"),
        (pb.Commit(step_ms=[30.0, -1.0]), r"Commit.step_ms is \[30.0, -1.0\], not durations"),
        (pb.CloudMessage.FromString(b"\x0a\x02\x28\x07").commit, "finish is 7"),
        (pb.Heartbeat(draft_ms=math.inf), "draft_ms"),
        (pb.Failure(detail="?"), "code is 0"),
        (None, "no kind"),
    ],
)
def test_malformed_cloud_message_is_refused(message: pb.Commit | pb.Heartbeat | pb.Failure | None, reason: str) -> None:
    received = pb.CloudMessage()
    if message is not None:
        getattr(received, type(message).__name__.lower()).MergeFrom(message)
    with pytest.raises(RemoteProtocolError, match=reason):
        wire.cloud_from_wire(received)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocabulary": None}, "vocabulary.digest"),
        ({"context_length": 0}, "context_length is 0"),
        ({"vocabulary_tokens": [b"a"]}, "1 vocabulary_tokens for a vocabulary of 2"),
        ({"step_ms": [30.0, 0.0]}, r"step_ms is \[30.0, 0.0\], not durations"),
    ],
)
def test_malformed_description_is_refused(changes: dict[str, object], reason: str) -> None:
    fields: dict[str, object] = {"vocabulary": pb.Fingerprint(size=2, digest=b"d"), "context_length": 512}
    with pytest.raises(RemoteProtocolError, match=reason):
        wire.description_from_wire(pb.Description(**{**fields, **changes}))  # type: ignore[arg-type]  # any by name


def _size(message: EdgeMessage | CloudMessage) -> int:
    if isinstance(message, Draft):
        return wire.edge_to_wire(message).ByteSize()
    assert isinstance(message, Commit)
    return wire.cloud_to_wire(message).ByteSize()


@pytest.mark.parametrize("num_tokens", [3, 5])
def test_steady_state_messages_stay_within_16_bytes_a_token(num_tokens: int) -> None:
    tokens = tuple(range(40_000, 40_000 + num_tokens))  # three bytes each: the upper half of a 49k vocabulary
    draft = Draft(start=300, parent_hash=2**61 - 2, tokens=tokens, confidence=b"\xff" * num_tokens)
    commit = Commit(300, tokens, num_tokens - 1, num_tokens - 1, queue_ms=3, verify_ms=70, max_ahead=32)
    assert _size(draft) <= 16 * num_tokens
    assert _size(commit) <= 16 * num_tokens


def test_a_commit_of_one_token_of_cloud_only_streaming_fits_the_budget_alone() -> None:
    assert _size(Commit(300, (40_000,), queue_ms=3, verify_ms=70, max_ahead=32)) <= 16


def test_sibling_costs_six_bytes_at_most_and_a_chain_none_for_its_parents() -> None:
    chain = Draft(start=300, parent_hash=2**61 - 2, tokens=(40_000,) * 4, confidence=b"\xff" * 4)
    tree = Draft(300, 2**61 - 2, (40_000,) * 6, b"\xff" * 6, parents=(-1, 2))
    assert b"\x2a" not in wire.edge_to_wire(chain).SerializeToString()  # the tag of the parents
    assert _size(tree) - _size(chain) <= 2 * 6


def test_draft_of_an_edge_that_knows_no_parents_is_a_chain() -> None:
    message = pb.EdgeMessage(draft=pb.Draft(start=3, parent_hash=9, tokens=[5, 6]))
    assert wire.edge_from_wire(message) == Draft(3, 9, (5, 6))
