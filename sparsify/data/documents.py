"""Turns the rows of a source into documents."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeGuard

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sparsify.common.errors import SparsifyError
from sparsify.data.files import file_shards
from sparsify.data.hub import hub_shards
from sparsify.data.objects import ObjectShard
from sparsify.data.sources import TOOLS, BadRows, BadRowsPolicy, Shard, Source, Unusable


@dataclass(frozen=True)
class Instruction:
    """A document of which only parts are learned, that is, are targets of the loss.

    Args:
        text: The whole text.
        learned: Start and end of each learned part, in characters.
    """

    text: str
    learned: tuple[tuple[int, int], ...]


Document = str | Instruction


def open_source(source: Source, stream: bool = False) -> Sequence[Shard]:
    """Finds the parts of a source, in a fixed order.

    Args:
        source: The source.
        stream: Whether to give each file of a data set as a part with positions of its own, rather
            than the data set as one part.

    Raises:
        SparsifyError: The source cannot be found or opened.
    """
    if source.in_memory:
        return [ObjectShard(source)]
    return hub_shards(source, stream) if source.hub else file_shards(source)


def read_documents(
    source: Source,
    bad_rows: BadRowsPolicy,
    report: BadRows,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[Document]:
    """Yields the documents of a source in a fixed order.

    Args:
        source: The source to read.
        bad_rows: "error" raises at the first unusable row; "skip" counts it in `report`.
        report: Counts the rows that "skip" leaves out.
        tokenizer: Needed for sources of messages only, which its chat template turns into text.

    Yields:
        One document, never empty.

    Raises:
        SparsifyError: The source is missing, has no file of a known kind, cannot be read or
            decoded, or a row is unusable and `bad_rows` is "error".
    """
    judge = Judge(source, bad_rows, report, tokenizer)
    usable = (
        document
        for shard in open_source(source)
        for number, row in shard.rows()
        if (document := judge(shard.name, number, row)) is not None
    )
    documents = islice(usable, source.documents)
    if not source.joined:
        yield from documents
    elif texts := [str(text) for text in documents]:
        yield "\n\n".join(texts)


class Judge:
    """Turns a row into a document, or counts it as unusable.

    Args:
        source, bad_rows, report, tokenizer: As for `read_documents`.

    Raises:
        SparsifyError: The source has messages, but the tokenizer has no chat template.
    """

    def __init__(
        self,
        source: Source,
        bad_rows: BadRowsPolicy,
        report: BadRows,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self._source, self._bad_rows, self._report = source, bad_rows, report
        self._tokenizer = tokenizer
        if source.messages_key is not None and not getattr(tokenizer, "chat_template", None):
            raise SparsifyError(
                f"{source.label} has messages, but the tokenizer has no chat template to write "
                "them: use an instruction model's tokenizer, or set tokenizer.chat_template"
            )

    def __call__(self, name: str, number: int, row: object) -> Document | None:
        """Return the document, or None for a row that is left out.

        Args:
            name: Name of the file, for messages.
            number: Number of the row.
            row: Value of the row.

        Raises:
            SparsifyError: The row is unusable, and such rows are errors.
        """
        document = row if isinstance(row, Unusable) else self._document(row)
        if not isinstance(document, Unusable):
            return document
        where = f"{name}:{number}"
        if self._bad_rows == "error":
            raise SparsifyError(
                f"{where}: {document.reason}{document.detail}; every document must be a text that "
                "is not empty: correct the row, or use --data.bad_rows skip, which counts such "
                "rows and leaves them out"
            )
        self._report.add(document.reason, where)
        return None

    def _document(self, row: object) -> Document | Unusable:
        source = self._source
        if not isinstance(row, dict):
            return Unusable("row is not an object")
        for key in source.keys:
            if key not in row:
                there = ", ".join(repr(other) for other in list(row)[:8]) or "none"
                return Unusable(
                    f"no key {key!r}",
                    f"; its keys are {there}: name the right one by text_key, prompt_key and "
                    "response_key, or messages_key, in {path: FILE, text_key: KEY} as the source",
                )
        if source.messages_key is not None:
            return self._conversation(row[source.messages_key], row.get(TOOLS))
        texts: list[str] = []
        for key in source.keys:
            may_be_empty = source.joined or key == source.prompt_key
            if (reason := _why_bad(row[key], key, may_be_empty)) is not None:
                return Unusable(reason)
            texts.append(row[key])
        if not source.masked:
            return texts[0]
        prompt, text = texts[0], "".join(texts)
        return Instruction(text, ((len(prompt), len(text)),))

    def _conversation(self, messages: object, tools: object) -> Instruction | Unusable:
        key = self._source.messages_key
        if not _are_objects(messages):
            return Unusable(f"value of {key!r} is not a list of messages")
        if isinstance(tools, str):  # as in tables, where the parameters of tools have no one type
            with suppress(ValueError, RecursionError):
                tools = json.loads(tools)
        if tools is not None and not _are_objects(tools):
            return Unusable(f"value of {TOOLS!r} is not a list of tools")
        turns = [_turn(message) for message in messages]
        for turn in turns:
            calls = turn.get("tool_calls")
            if calls is not None and not _are_objects(calls):
                return Unusable("value of 'tool_calls' is not a list of calls")
            parts = [turn.get("role"), turn.get("content")]
            if calls and parts[1] is None:  # a message that only calls says nothing
                del parts[1]
            for part in parts:
                if (reason := _why_bad(part, "role and content", may_be_empty=True)) is not None:
                    return Unusable(reason)
        if not any(turn["role"] == "assistant" for turn in turns):
            return Unusable("no message of the assistant")
        if turns[0]["role"] == "assistant":
            return Unusable(
                "the assistant's message comes first",
                ", and chat templates open one only after another message, so that its part "
                "cannot be found: put the user's message or a system message before it",
            )
        try:
            return self._written(turns, _without_nulls(tools) or None)
        except TemplateError as error:
            return Unusable("messages that the chat template refuses", f" ({error})")

    def _written(self, turns: list[dict[str, Any]], tools: Any) -> Instruction | Unusable:
        text = self._write(turns, tools)
        if (reason := _why_bad(text, "messages", may_be_empty=False)) is not None:
            return Unusable(reason)
        without = [{key: turn[key] for key in turn if key != "tool_calls"} for turn in turns]
        for part, others in ((TOOLS, (turns, None)), ("tool_calls", (without, tools))):
            with suppress(TemplateError):  # then the template reads them
                if others != (turns, tools) and self._write(*others) == text:
                    return Unusable(
                        f"{part} that the chat template leaves out",
                        ": use the tokenizer of a model that calls tools, or remove them",
                    )
        learned = []
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                # The template's opening words ask the model to speak; its answer follows them.
                before = self._write(turns[:number], tools, opened=True)
                after = self._write(turns[: number + 1], tools)
                if not (text.startswith(after) and after.startswith(before)):
                    return Unusable(
                        "turns that the chat template changes when more follow",
                        ", so that the assistant's part cannot be found: split the row into "
                        "conversations of one turn",
                    )
                learned.append((len(before), len(after)))
        return Instruction(text, tuple(learned))

    def _write(self, turns: list[dict[str, Any]], tools: Any, opened: bool = False) -> str:
        tokenizer: Any = self._tokenizer
        try:
            text: str = tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=opened
            )
        except Exception as error:  # a template is a program, and may end in any error
            raise TemplateError(str(error) or type(error).__name__) from error
        return text


def _are_objects(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(element, dict) for element in value)


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    """The message as a template gets it, whole but for what is empty."""
    turn: dict[str, Any] = _without_nulls(message)
    if not turn.get("tool_calls"):
        turn.pop("tool_calls", None)
    if "content" in message:
        turn["content"] = message["content"]  # null too, as in messages that only call
    return turn


def _without_nulls(value: Any) -> Any:
    """The value without fields that are null: a table gives each message the fields of all, and
    templates ask whether there is one.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _why_bad(text: object, key: str, may_be_empty: bool) -> str | None:
    if not isinstance(text, str):
        return f"value of {key!r} is not a string"
    if not may_be_empty and not text.strip():
        return "empty text"
    try:
        text.encode()  # JSON escapes may spell half a surrogate pair, which tokenizers refuse
    except UnicodeEncodeError:
        return "text is not valid Unicode"
    return None
