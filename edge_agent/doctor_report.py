"""A diagnosis in words for people, or as one JSON object."""

import json
from dataclasses import asdict

import typer
from rich.console import Console
from rich.text import Text

from edge_agent.doctor import Diagnosis, Expected
from shared.policy.limit import LONGEST_RTT_MS


def show_diagnosis(diagnosis: Diagnosis, as_json: bool) -> None:
    """Print it."""
    if as_json:
        typer.echo(json.dumps(_as_dict(diagnosis)))
        return
    console = Console(highlight=False, soft_wrap=True)
    for check in diagnosis.checks:
        mark, style = ("ok", "green") if check.is_ok else ("FAILED", "bold red")
        console.print(Text(f"{mark:>6}  ", style), Text(f"{check.name}: {check.found}"), sep="")
        if check.to_do:
            console.print(Text(f"        to do: {check.to_do}", "yellow"))
    if diagnosis.expected is not None:
        console.print()
        console.print(Text(in_words(diagnosis.expected)))
    for advice in diagnosis.advice:
        console.print(Text(f"Set {advice.key}: {advice.value} ({advice.why})."))
    if diagnosis.is_sound and not diagnosis.advice:
        console.print(Text("No setting needs to be changed."))


def in_words(expected: Expected) -> str:
    """What an answer will be like."""
    local = "no local text" if expected.local_tpot_ms is None else f"local {expected.local_tpot_ms:.1f}"
    cloud_only, speculative = expected.cloud_only_tpot_ms, expected.speculative_tpot_ms
    if cloud_only is None or speculative is None or expected.paying_rtt_ms is None:
        return f"Expected time per token, ms: {local}; without a verifier nothing else."
    if expected.local_tpot_ms is not None:
        local += " (the draft model's own text)"
    ratio = cloud_only / speculative
    if expected.paying_rtt_ms <= 0:
        until = "Drafting gains less than 10 % at any round trip."
    elif expected.paying_rtt_ms >= LONGEST_RTT_MS:
        until = f"Drafting gains 10 % or more at any round trip up to {LONGEST_RTT_MS / 1000:g} s."
    else:
        until = f"Drafting gains 10 % or more up to a round trip of {expected.paying_rtt_ms:.0f} ms."
    return (
        f"Expected time per token, ms: cloud-only {cloud_only:.1f}, speculative {speculative:.1f} ({ratio:.2f}x),"
        f" {local}. {until}"
    )


def _as_dict(diagnosis: Diagnosis) -> dict[str, object]:
    whole = asdict(diagnosis)
    if diagnosis.expected is not None:
        whole["expected"] |= {"in_words": in_words(diagnosis.expected)}
    return {"is_sound": diagnosis.is_sound, **{name: _rounded(value) for name, value in whole.items()}}


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
