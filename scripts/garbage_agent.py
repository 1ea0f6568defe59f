"""`edge-agent` whose drafts are replaced by garbage, at the draft model's own speed: what the worst draft costs."""

from pathlib import Path

from edge_agent import engines
from edge_agent.config import DraftConfig
from shared.testing.engines import GarbageDraft

_load = engines.load_draft


def _load_garbage(config: DraftConfig, path: Path) -> engines.LoadedDraft:
    loaded = _load(config, path)
    return engines.LoadedDraft(GarbageDraft(loaded.engine), loaded.model)


if __name__ == "__main__":
    engines.load_draft = _load_garbage

    from edge_agent.__main__ import main  # now that it finds ours

    main()
