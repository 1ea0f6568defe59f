"""From settings to what they describe: a request, a session's settings and policy, an agent."""

import uuid

from edge_agent.agent import EdgeAgent
from edge_agent.channel import Channel
from edge_agent.config import EdgeConfig
from edge_agent.engines import LoadedDraft
from edge_agent.engines.chat import chat_prompt
from shared.core.link import LinkSettings
from shared.core.messages import Want
from shared.core.policies import DraftPolicy
from shared.core.settings import EdgeSettings, OnDisconnect, Request
from shared.engine import EngineError
from shared.policy.run_ahead import RunAhead, StopAndWait


def make_request(config: EdgeConfig, loaded: LoadedDraft, prompt: str) -> Request:
    """The prompt as tokens, with everything that fixes the text. Raises `EngineError` where it does not fit."""
    model, generation = loaded.model, config.generation
    if generation.chat:
        system = [{"role": "system", "content": generation.system_prompt}] if generation.system_prompt else []
        tokens = chat_prompt(model, [*system, {"role": "user", "content": prompt}])
    else:
        tokens = model.tokenize(prompt, add_special=True)
    room = loaded.engine.capabilities.max_context
    if not tokens or len(tokens) >= room:
        what = (
            f"the prompt has {len(tokens)} tokens, the draft's context {room}; shorten it or raise draft.context_tokens"
        )
        raise EngineError(what if tokens else "the prompt is empty")
    return Request(
        session_id=uuid.uuid4().hex[:16],
        prompt=tuple(tokens),
        max_new_tokens=generation.max_new_tokens,
        vocabulary=loaded.engine.fingerprint,
        sampling=config.sampling.to_sampling(),
        stop_ids=model.eog_ids,
        want=Want.SPECULATE if config.speculation.enabled else Want.STREAM,
    )


def make_settings(config: EdgeConfig, offline: bool = False) -> EdgeSettings:
    """How a session treats its link, by these settings. A draft that cannot write waits where others go on alone."""
    link, on_disconnect = config.link, config.link.on_disconnect
    if on_disconnect is OnDisconnect.CONTINUE and not config.draft.can_write:
        on_disconnect = OnDisconnect.PAUSE
    return EdgeSettings(
        link=LinkSettings(max_stall_ms=link.max_stall_ms, heartbeat_ms=link.heartbeat_ms),
        patience_ms=link.patience_ms,
        connect_timeout_ms=link.connect_timeout_ms,
        backoff_initial_ms=link.backoff_initial_ms,
        backoff_max_ms=link.backoff_max_ms,
        on_disconnect=on_disconnect,
        on_reconnect=link.on_reconnect,
        offline=offline,
    )


def make_policy(config: EdgeConfig) -> DraftPolicy:
    """How far to draft ahead, by these settings."""
    speculation = config.speculation
    if speculation.run_ahead:
        return RunAhead(speculation.max_ahead_tokens, speculation.message_interval_ms, speculation.draft_duty)
    return StopAndWait(speculation.draft_tokens)


def make_agent(config: EdgeConfig, loaded: LoadedDraft, offline: bool = False) -> EdgeAgent:
    """The agent that these settings describe, ready to answer; nothing is dialled yet."""
    token = config.verifier.token
    channel = Channel(config.verifier, token.get_secret_value() if token else None)
    settings, policy = make_settings(config, offline), make_policy(config)
    return EdgeAgent(loaded.engine, loaded.model.vocabulary, channel, settings, policy)
