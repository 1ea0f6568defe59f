"""`edge-agent` whose drafts are replaced by garbage, at the draft model's own speed: what the worst draft costs."""

from pathlib import Path

from edge_agent import __main__ as cli
from edge_agent.config import DraftConfig
from edge_agent.engines import LoadedDraft, load_draft
from shared.testing.engines import GarbageDraft


def _load_garbage(config: DraftConfig, path: Path) -> LoadedDraft:
    loaded = load_draft(config, path)
    return LoadedDraft(GarbageDraft(loaded.engine), loaded.model)


if __name__ == "__main__":
    cli.load_draft = _load_garbage
    cli.main()
