"""A chat: what a judge's model writes of itself, sampled beside the rows that it judges.

To the engine a chat is a row without responses. Its prompt is the conversation in the model's chat
template and nothing else, its samples have texts and no scores, and its verdict has no vote. So it
takes the same way as a row: the same queue, the same cache, bits that depend on itself alone. The
texts of its messages are tokenized without control tokens, as those of every row.

`make_row` refuses a row without responses, so that no input becomes a chat by accident.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.generate import GroupResult
from engine.prompt import PromptBuilder
from engine.request import Message, Row, make_row
from engine.scalar_judge import with_responses
from engine.verdict import Sample, Verdict
from models.tokenizer import Tokenizer


def make_chat(messages: Sequence[Message | Mapping[str, Any]], id: str | None = None) -> Row:
    """The row of a conversation that ends with the user; raises RowError as `make_row` does. Its
    draws depend on `id`, by default a hash of what it says."""
    return replace(make_row(messages, [""], id=id), responses=())


def is_chat(row: Row) -> bool:
    """Whether nothing is judged."""
    return not row.responses


def chat_segments(prompts: PromptBuilder, chat: Row) -> list[tuple[int, ...]]:
    """A chat's prompt as segments; prompts: those of CONVERSATION. Raises ValueError where the chat
    template refuses the conversation."""
    shown = with_responses(chat, (), prompts.trims)
    return [segment.token_ids for segment in prompts.segments(shown, ())]


def reply_of(chat: Row, key: str, k: int, result: GroupResult, tokenizer: Tokenizer) -> Verdict:
    """The verdict of a chat: its samples, none of which votes."""
    samples = [
        Sample(
            order=(),
            text=tokenizer.decode([t for t in each.token_ids if t < tokenizer.size]),
            scores=None,
            invalid="missing",
            meta=None,
            tokens=len(each.token_ids),
            finish=each.finish,
            token_ids=each.token_ids,
            logprobs=each.logprobs,
            sampling_logprobs=each.sampling_logprobs,
        )
        for each in result.generations
    ]
    prompts = result.group.prompts[: len(samples)]
    return Verdict(
        id=chat.id, key=key, best=None, scores=None, mean_scores=None, tie=False, k=k, valid=0,
        votes=0, samples=samples,
        prompt_tokens=sum(sum(map(len, prompt)) for prompt in prompts),
        tree_tokens=result.tree_tokens,
        decode_tokens=sum(sample.tokens for sample in samples),
        partial=result.drawn is not None,
    )  # fmt: skip
