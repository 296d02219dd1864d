"""What became of the data: counts, lengths and examples of one prepared set, for terminal and data_report.json."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hafrm_ds.data.comparisons import is_order, is_whole_order
from hafrm_ds.data.content_keys import unique_keys
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.lengths import starts_of
from hafrm_ds.data.pairs import names_in_words
from hafrm_ds.data.tables import Cell, Table, as_text, count, listed_sources
from hafrm_ds.data.tokenization import TokenizedGroup

PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


@dataclass
class Counts:
    """Groups of one source, or of all, which mostly are pairs: read = deselected + dropped + kept."""

    read: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    """Row format -> rows read in it. Rows that a row filter left out are read in none."""
    deselected: dict[str, int] = field(default_factory=dict)
    """Reason -> rows that the user's filters, caps and portions left out, or that hold no preference (ties)."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> selected rows that are no usable pair; they count against data.max_dropped_share."""
    kept: int = 0
    cut: int = 0
    """Kept groups that lost tokens to max_length."""

    @property
    def selected(self) -> int:
        return self.read - sum(self.deselected.values())

    @property
    def dropped_share(self) -> float:
        return sum(self.dropped.values()) / self.selected if self.selected else 0.0

    def add(self, number: int, *, format: str, deselected: str, dropped: str, cut: bool) -> None:
        """Count `number` rows that share one fate."""
        self.read += number
        if format:
            self.formats[format] = self.formats.get(format, 0) + number
        if deselected:
            self.deselected[deselected] = self.deselected.get(deselected, 0) + number
        elif dropped:
            self.dropped[dropped] = self.dropped.get(dropped, 0) + number
        else:
            self.kept += number
            self.cut += number * cut


def sum_of(parts: Iterable[Counts]) -> Counts:
    """The counts of several sources together."""
    total = Counts()
    for part in parts:
        for name in ("read", "kept", "cut"):
            setattr(total, name, getattr(total, name) + getattr(part, name))
        for name in ("formats", "deselected", "dropped"):
            setattr(total, name, dict(Counter(getattr(total, name)) + Counter(getattr(part, name))))
    return total


@dataclass(frozen=True)
class TemplateFacts:
    """How conversations were rendered."""

    origin: str
    text: str
    bos: str
    bos_token: str | None
    frozen_dates: tuple[str, ...]
    fingerprint: str

    @classmethod
    def of(cls, formatter: ChatFormatter) -> "TemplateFacts":
        return cls(
            origin=formatter.template_origin,
            text=formatter.template,
            bos=formatter.bos,
            bos_token=formatter.tokenizer.bos_token,
            frozen_dates=formatter.frozen_dates,
            fingerprint=formatter.fingerprint,
        )

    @property
    def in_words(self) -> str:
        bos = {
            "none": "no BOS: neither the template nor the tokenizer adds one",
            "template": f"BOS {self.bos_token!r} written by the template",
            "added": f"BOS {self.bos_token!r}, which the tokenizer adds by default, put in front of the template",
        }[self.bos]
        origin = "the tokenizer's own" if self.origin == "tokenizer" else self.origin
        dates = f"; date frozen to {', '.join(self.frozen_dates)}" if self.frozen_dates else ""
        return f"{origin} ({self.fingerprint[:12]}); {bos}{dates}"


@dataclass(frozen=True)
class Example:
    """A comparison of a kept group as the model sees it: the text of its ids, cuts included."""

    id: str
    source: str
    prompt: str
    chosen: str
    rejected: str

    @classmethod
    def of(cls, group: TokenizedGroup, tokenizer: PreTrainedTokenizerBase, comparison: int = 0) -> "Example":
        """Of one of its comparisons: the first is that of a pair."""
        better, worse, *_ = group.comparisons[comparison]
        prompt, chosen, rejected = (
            tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            for ids in (group.prompt_ids, group.responses[better], group.responses[worse])
        )
        return cls(group.id, group.source, prompt, chosen, rejected)


@dataclass(frozen=True)
class GroupFacts:
    """What a set holds whose groups are not all pairs.

    answers, comparisons: of all kept groups. sizes: number of answers -> kept groups that have so many.
    soft: comparisons with a probability below 1. contradictory: groups whose comparisons are no order. partial: groups
    that lack a comparison which their others imply, or have one twice.
    lost: why answers and comparisons of kept groups are not used -> groups that have lost one so.
    """

    answers: int
    comparisons: int
    sizes: dict[str, int]
    soft: int
    contradictory: int
    partial: int
    lost: dict[str, int]

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray], lost: dict[str, int]) -> "GroupFacts":
        """Of the columns that `prepared.save_groups` takes."""
        sizes, numbers = np.unique(columns["num_responses"], return_counts=True)
        first = starts_of(columns["num_comparisons"])
        edges = np.stack([columns["better"], columns["worse"]], axis=1)
        groups = [
            (int(number), edges[start:end].tolist())
            for number, start, end in zip(columns["num_responses"], first, first[1:])
            if end - start > 1
        ]
        ordered = [group for group in groups if is_order(*group)]
        return cls(
            answers=len(columns["response"]),
            comparisons=len(edges),
            sizes={str(size): int(number) for size, number in zip(sizes, numbers)},
            soft=int((columns["target"] < 1).sum()),
            contradictory=len(groups) - len(ordered),
            partial=sum(not is_whole_order(*group) for group in ordered),
            lost=lost,
        )

    @property
    def in_words(self) -> str:
        sizes = ", ".join(f"{number:,} of {size}" for size, number in self.sizes.items())
        said = f"{self.answers:,} answers (groups of so many: {sizes}), {self.comparisons:,} comparisons"
        if self.soft:
            said += f", {self.soft:,} with a probability below 1"
        if self.contradictory:
            said += f"; in {self.contradictory:,} groups they contradict one another"
        return said


@dataclass
class DataReport:
    """One prepared set: what was read, left out, dropped, cut and kept, and what it looks like."""

    role: str
    """"train" or "eval"."""
    max_length: int
    truncation: str
    total: Counts
    by_source: dict[str, Counts]
    first_dropped: dict[str, str]
    """Reason -> id (file and row) of the first pair dropped for it."""
    duplicates: int
    """Kept pairs whose ids repeat those of an earlier kept pair. They are allowed."""
    both_orders: int
    """Different kept pairs that are also there with chosen and rejected swapped. They are allowed."""
    tokens: dict[str, dict[str, int]]
    """prompt, chosen, rejected (where groups are not all pairs: answer), conversation (the longest of a group),
    conversation_before_cut (of all groups that could be rendered) -> percentile -> tokens."""
    template: TemplateFacts
    examples: list[Example]
    with_margin: int = 0
    """Kept pairs that have a margin."""
    policy_alone: int = 0
    """Kept pairs of sources whose reward_loss is false."""
    not_read: list[str] = field(default_factory=list)
    """Columns that are filled in some row, but that its format does not read."""
    mapped_roles: dict[str, int] = field(default_factory=dict)
    """"human -> user" -> rows with messages of a role that was read as another."""
    margin_faults: int = 0
    """Kept pairs whose margin could not be read; training with objective.use_margin refuses them."""
    first_margin_fault: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    """What the chat template does not write -> kept pairs that hold it."""
    marks: dict[str, int] = field(default_factory=dict)
    """Special token or mark of a template -> kept pairs whose texts hold it."""
    with_marks: int = 0
    """Kept pairs whose texts hold any."""
    groups: GroupFacts | None = None
    """What else there is to say where not all groups are pairs."""
    attributes: dict[str, int] = field(default_factory=dict)
    """Name -> answers of kept groups that have a value of it."""

    def to_json(self) -> dict[str, Any]:
        """Plain mapping for data_report.json."""
        left_out: dict[str, Any] = {"groups": None, "attributes": {}, "policy_alone": 0}  # of what most sets have not
        return {name: value for name, value in asdict(self).items() if left_out.get(name, ...) != value}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "DataReport":
        """The inverse of `to_json`. Raises KeyError or TypeError if `content` has other fields."""
        template = content["template"]
        parts = {
            "total": Counts(**content["total"]),
            "by_source": {name: Counts(**counts) for name, counts in content["by_source"].items()},
            "template": TemplateFacts(**template | {"frozen_dates": tuple(template["frozen_dates"])}),
            "examples": [Example(**example) for example in content["examples"]],
            "groups": GroupFacts(**content["groups"]) if "groups" in content else None,
        }
        return cls(**content | parts)

    def render(self, with_examples: bool = True) -> RenderableType:
        """Tables and examples for a rich console. Data goes in as Text, never as rich markup."""
        *tables, lengths = self.tables()
        return Group(
            *tables,
            *map(as_text, self._remarks()),
            lengths,
            Text(f"Template: {self.template.in_words}"),
            *map(as_text, self._warnings()),
            *(render_example(example) for example in self.examples if with_examples),
        )

    @property
    def unit(self) -> str:
        """What is counted."""
        return "pairs" if self.groups is None else "groups"

    @property
    def in_words(self) -> str:
        compared = "pairs" if self.groups is None else "comparisons"
        return (
            f"{self.total.cut:,} {self.unit} cut to {self.max_length:,} tokens ({self.truncation}), "
            f"{self.duplicates:,} exact duplicates, {self.both_orders:,} {compared} present in both orders."
        )

    def tables(self) -> list[Table]:
        """Counts by source, why pairs are not used (if any are not), and token lengths."""
        rows = []
        sources = listed_sources(self.by_source, lambda counts: counts.read, sum_of)
        for name, counts in [*sources.items(), ("total", self.total)]:
            deselected, dropped = sum(counts.deselected.values()), sum(counts.dropped.values())
            numbers = (counts.read, deselected, dropped, counts.kept, counts.cut)
            formats = ", ".join(counts.formats)
            rows.append((name, [*map(count, numbers), Cell("", formats) if counts is self.total else Cell(formats)]))
        header = ("Source", "read", "deselected", "dropped", "kept", "of these cut", "format")
        tables = [Table(rows, header, texts=1)]
        reasons = [(f"deselected: {name}", [count(pairs), Cell("")]) for name, pairs in self.total.deselected.items()]
        reasons += [
            (f"dropped: {name}", [count(pairs), Cell(self.first_dropped.get(name, ""))])
            for name, pairs in self.total.dropped.items()
        ]
        if reasons:
            tables.append(Table(reasons, (f"Why {self.unit} are not used", self.unit, "first"), texts=1))
        lengths = [
            (name.replace("_", " "), [count(values.get(percentile)) for percentile in PERCENTILES])
            for name, values in self.tokens.items()
        ]
        return [*tables, Table(lengths, ("Tokens", *PERCENTILES))]

    def _remarks(self) -> Iterator[str]:
        """What is said below the counts."""
        yield self.in_words
        if self.groups is not None:
            yield self.groups.in_words
            for reason, groups in self.groups.lost.items():
                yield f"answers or comparisons left out in {groups:,} groups: {reason}"
        kept = self.total.kept
        if self.policy_alone:
            yield f"{self.policy_alone:,} of {kept:,} {self.unit} train the policy loss alone (reward_loss: false)"
        if self.with_margin not in (0, kept):  # in the loss the others count with a margin of 0
            share = self.with_margin / kept
            yield f"{self.with_margin} of {kept} {self.unit} ({share:.1%}) have a margin; the others count as 0"
        if self.attributes:
            known = names_in_words(f"{name} ({answers:,})" for name, answers in self.attributes.items())
            yield f"attributes, and the answers that have them: {known}"
        if self.not_read:
            yield f"not read: {names_in_words(self.not_read)}"
        if self.mapped_roles:
            roles = names_in_words(f"{role} ({rows:,} rows)" for role, rows in self.mapped_roles.items())
            yield f"roles read as others: {roles}"
        if self.margin_faults:
            yield f"{self.margin_faults} margins could not be read (first: {self.first_margin_fault})"

    def _warnings(self) -> Iterator[str]:
        """What the template leaves out, and marks that texts hold."""
        kept = self.total.kept
        for kind, pairs in self.left_out.items():
            yield f"WARNING {pairs:,} of {kept:,} {self.unit} hold text that the template does not write: {kind}"
        if self.marks:
            most = sorted(self.marks.items(), key=lambda item: -item[1])
            names = names_in_words(f"{mark} ({pairs:,})" for mark, pairs in most)
            yield (
                f"WARNING {self.with_marks:,} of {kept:,} {self.unit} hold special tokens or marks of a chat template "
                f"in their texts: {names}. If they were rendered before, they are rendered twice now"
            )


# ---- counting ------------------------------------------------------------------------------------------------------


def count_outcomes(table: pa.Table) -> tuple[Counts, dict[str, Counts]]:
    """Count rows by fate -> (all sources, source -> its counts), sources and reasons in order of appearance.

    Args:
        table: columns source, format, deselected, dropped (string) and cut (bool).
    """
    total = Counts()
    by_source: dict[str, Counts] = {}
    fates = table.group_by(["source", "format", "deselected", "dropped", "cut"], use_threads=False)
    groups = fates.aggregate([([], "count_all")])
    for group in groups.to_pylist():
        source, number = group.pop("source"), group.pop("count_all")
        for counts in (total, by_source.setdefault(source, Counts())):
            counts.add(number, **group)
    return total, by_source


def count_repeats(keys: np.ndarray) -> tuple[int, int]:
    """Pairs that repeat an earlier one, and different pairs that are there in both orders.

    Args:
        keys: [C, 2] KEY_DTYPE, of the better and the worse response of each comparison.
    """
    different, place = unique_keys(keys.reshape(-1))
    # A pair as one number: np.unique compares rows ten times slower.
    chosen, rejected = place.reshape(-1, 2).T
    ordered = np.unique(chosen * len(different) + rejected)
    chosen, rejected = np.divmod(ordered, max(1, len(different)))
    unordered = np.unique(np.minimum(chosen, rejected) * len(different) + np.maximum(chosen, rejected))
    return len(keys) - len(ordered), len(ordered) - len(unordered)


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Lengths [pairs] -> percentile name -> a length that occurs; empty without pairs."""
    if not len(lengths):
        return {}
    values = np.percentile(lengths, list(PERCENTILES.values()), method="higher")
    return dict(zip(PERCENTILES, map(int, values)))


# ---- showing -------------------------------------------------------------------------------------------------------


def render_example(example: Example) -> Panel:
    lines = [
        Text.assemble((f"{name}: ", "bold"), as_text(getattr(example, name)))
        for name in ("prompt", "chosen", "rejected")
    ]
    return Panel(Group(*lines), title=as_text(f"{example.id} ({example.source})"), title_align="left")


def render_tokens(group: TokenizedGroup, tokenizer: PreTrainedTokenizerBase) -> Panel:
    """The tokens of a group one by one; >>token<< marks where the reward of each conversation is read."""
    lines = [Text.assemble((f"prompt, {len(group.prompt_ids)} tokens: ", "bold"), spelled(group.prompt_ids, tokenizer))]
    names = (
        ["chosen", "rejected"]
        if len(group.responses) == 2
        else [f"answer {number}" for number in range(len(group.responses))]
    )
    for name, ids, read_out in zip(names, group.responses, group.read_outs):
        lines.append(
            Text.assemble(
                (f"{name}, {len(ids)} tokens, read-out at index {read_out}: ", "bold"),
                spelled(ids[:-1], tokenizer),
                (f" >>{spelled(ids[-1:], tokenizer)}<<", "reverse"),
            )
        )
    return Panel(Group(*lines), title=as_text(f"{group.id} ({group.source})"), title_align="left")


def spelled(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Each token in quotes, so that spaces and newlines show."""
    return " ".join(repr(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in ids)
