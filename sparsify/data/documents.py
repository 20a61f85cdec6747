"""Turns the rows of a source into documents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sparsify.common.errors import SparsifyError
from sparsify.data.files import file_shards
from sparsify.data.hub import hub_shards
from sparsify.data.objects import ObjectShard
from sparsify.data.sources import BadRows, BadRowsPolicy, Shard, Source, Unusable


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
            return self._conversation(row[source.messages_key])
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

    def _conversation(self, messages: object) -> Instruction | Unusable:
        key = self._source.messages_key
        if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
            return Unusable(f"value of {key!r} is not a list of messages")
        turns = [{"role": turn.get("role"), "content": turn.get("content")} for turn in messages]
        for part in (value for turn in turns for value in turn.values()):
            if (reason := _why_bad(part, "role and content", may_be_empty=True)) is not None:
                return Unusable(reason)
        if not any(turn["role"] == "assistant" for turn in turns):
            return Unusable("no message of the assistant")
        try:
            return self._written(turns)
        except TemplateError as error:
            return Unusable("messages that the chat template refuses", f" ({error})")

    def _written(self, turns: list[dict[str, Any]]) -> Instruction | Unusable:
        def write(count: int, opened: bool = False) -> str:
            tokenizer: Any = self._tokenizer
            text: str = tokenizer.apply_chat_template(
                turns[:count], tokenize=False, add_generation_prompt=opened
            )
            return text

        text = write(len(turns))
        learned = []
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                # The template's opening words ask the model to speak; its answer follows them.
                before, after = write(number, opened=True), write(number + 1)
                if not (text.startswith(after) and after.startswith(before)):
                    return Unusable(
                        "turns that the chat template changes when more follow",
                        ", so that the assistant's part cannot be found: split the row into "
                        "conversations of one turn",
                    )
                learned.append((len(before), len(after)))
        return Instruction(text, tuple(learned))


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
