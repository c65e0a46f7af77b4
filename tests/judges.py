"""Judges that differ from one another in a single respect."""

from typing import Any

from engine.judge import Judge


def rebuilt(judge: Judge, **changes: Any) -> Judge:
    """A judge of the same model, templates and fingerprint, with changes."""
    arguments: dict[str, Any] = {
        "judge_template": judge.prompts.judge_template,
        "settings": judge.settings,
        "fingerprint": judge.fingerprint,
    }
    return Judge(judge.model, judge.tokenizer, **(arguments | changes))
