"""The engine: many sequences of one model over states that it owns; they join, advance together and leave.

    engine = Engine(model, rows=8, tokens=65_536)
    sequence = engine.add(prompt_ids, most=200, sampling=Sampling(temperature=0.7, seed=1), stops={eos_id})
    while engine.busy:
        for token in engine.step():
            ...                       # token.sequence, token.id, token.finish
    engine.remove(sequence)

One thread calls it. A prompt is read in pieces that end at multiples of `chunk` and at its marks, whatever else is
there, so that a sequence meets the same sums alone and among others; its last token is read by the decoding step when
all before it was read already, so that a restored sequence meets the same sums as one that goes on, and always in
models of which a prompt passes the lower layers alone.

Legend: B sequences, M pages of the longest, V vocabulary.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trihybrid.infer.admission import Admission
from trihybrid.infer.execution import Execution, make_decoder
from trihybrid.infer.network import Network
from trihybrid.infer.paging import EngineFull, PageBook
from trihybrid.infer.sampling import GREEDY, Sampling, choose
from trihybrid.infer.sequence import PAGE, Finish, Running, Snapshot, Token
from trihybrid.infer.weights import Weights

__all__ = ["PAGE", "Engine", "EngineFull", "Execution", "Finish", "Snapshot", "Token"]


class Engine:
    """A teacher or a student over preallocated states.

    Args:
        model: any teacher or student of `models.families`, on its device, in its dtype. The engine takes it over: eval
            mode, no gradients; nobody else may train or move it.
        rows: how many sequences it holds at a time, at least 1.
        tokens: tokens that all sequences and snapshots together may store in layers that grow; None grows as needed.
        chunk: most tokens of prompts that one step works on. A longer prompt takes several steps, between which the
            others advance.
        execution: how a decoding step runs: `eager` launches operator by operator; on a CPU `compiled` is a program of
            torch.compile, which takes a while at the start; on a GPU `graph` replays a CUDA graph, `fused-graph` one
            whose small operators torch.compile has fused, `kernels` one of our kernels for few sequences.
        weights: how the linear maps are kept: `full`, or quantised to `int8` or `int4`, see `infer.weights`.

    Attributes:
        vocabulary: V.
        chunk: as given.

    Raises:
        ValueError: a number out of range; states that do not fit into what is free, before anything is allocated; an
            execution or weights that the device or the model cannot have, with the reason.
    """

    vocabulary: int
    chunk: int

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int = 1,
        tokens: int | None = None,
        chunk: int = 512,
        execution: Execution = "eager",
        weights: Weights = "full",
    ) -> None:
        for name, value in (("rows", rows), ("tokens", 1 if tokens is None else tokens), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self._network = Network(model.eval().requires_grad_(False), rows, PAGE, tokens or 0, weights)
        self._states = self._network.states
        self._book = PageBook(self._states, tokens)
        self._decoder = make_decoder(self._network, execution)
        self.chunk, self.vocabulary = chunk, self._network.vocabulary
        self._admission = Admission(self.vocabulary, self._network.media, self._network.positions)
        # Rows: those that decode stand in front, so that a step works on one slice.
        self._rows: list[Running | None] = [None] * rows
        self._ready = 0
        self._waiting: list[Running] = []
        self._sequences: dict[int, Running] = {}
        self._next = 0
        self._snapshots: set[Snapshot] = set()

    @property
    def busy(self) -> bool:
        """Whether a step would do anything: a sequence waits for its prompt or is not finished."""
        return bool(self._waiting) or self._ready > 0

    @property
    def free_rows(self) -> int:
        """How many more sequences `add` takes now."""
        return self._rows.count(None)

    @property
    def free_tokens(self) -> int | None:
        """How many more tokens can be stored; None where storage grows as needed, or nothing grows."""
        free = self._book.free
        return None if free is None or not self._states.pages else free * PAGE

    def add(
        self,
        tokens: Sequence[int],
        *,
        most: int,
        sampling: Sampling = GREEDY,
        stops: Collection[int] = (),
        prefix: Snapshot | None = None,
        marks: Collection[int] = (),
    ) -> int:
        """Let a sequence join; its prompt is worked on by the next steps.

        Args:
            tokens: all tokens that it begins with, those of `prefix` included, at least one, each in 0 to V - 1.
            most: how many tokens to choose at most, at least 1. Room for all of them is set aside now.
            sampling: how they are chosen.
            stops: tokens that end it.
            prefix: a state that has seen the first of these tokens, at least one fewer than all.
            marks: numbers of tokens behind which a snapshot is to be taken on the way through the prompt, each above
                the prefix and below `len(tokens)`; see `collect`.

        Returns:
            a number that names it in `Token.sequence` and in the calls below, never used twice.

        Raises:
            EngineFull: no room now. A sequence that could never fit is a plain ValueError.
            ValueError: an argument out of range; tokens that do not begin with those of the prefix.
        """
        if prefix is not None:
            self._check_held(prefix)
        self._admission.check(tokens, most, prefix, marks)
        seen = 0 if prefix is None else len(prefix.tokens)
        shared = [] if prefix is None else prefix.pages[: seen // PAGE]
        # The last token is chosen and never read.
        needed = self._book.pages_for(len(tokens) + most - 1)
        spare = sum(mark % PAGE > 0 for mark in set(marks)) if self._states.pages else 0
        if self._book.limit is not None and needed + spare > self._book.limit:
            raise ValueError(
                f"{len(tokens):,} tokens and {most:,} new ones need {(needed + spare) * PAGE:,} places for keys and "
                f"values; the engine has {self._book.limit * PAGE:,} in all: shorten the prompt, or give it more tokens"
            )
        if None not in self._rows:
            raise EngineFull(f"all {len(self._rows)} rows are taken")
        row = len(self._rows) - 1 - self._rows[::-1].index(None)
        own = self._book.take(needed - len(shared) + spare)
        self._book.share(shared)
        sequence = Running(
            self._next,
            [int(token) for token in tokens],
            len(tokens) + most,
            sampling,
            frozenset(stops),
            shared + own[spare:],
            own[:spare],
            seen,
            sorted(set(marks)),
        )
        if prefix is None:
            self._states.clear(row)
        else:
            self._states.write_row(row, prefix.line)
            if len(shared) < len(prefix.pages):
                self._states.copy_page(prefix.pages[len(shared)], sequence.pages[len(shared)])
        self._next += 1
        self._rows[row] = self._sequences[sequence.number] = sequence
        self._waiting.append(sequence)
        return sequence.number

    def step(self) -> list[Token]:
        """Work on at most `chunk` tokens of waiting prompts, then let every sequence that is ready choose one token.

        Returns:
            the tokens chosen, at most one a sequence. A finished sequence keeps its row and state until `remove`, so
            that a snapshot can be taken of it, and takes no further part.
        """
        with torch.inference_mode():
            begun = self._read_prompts()
            ready = [sequence for sequence in self._rows[: self._ready] if sequence is not None]
            decoded = self._decode(ready) if ready else []
        chosen = []
        for sequence, token in decoded + begun:
            sequence.tokens.append(token)
            if token in sequence.stops:
                sequence.finish = "stop"
            elif len(sequence.tokens) == sequence.end:
                sequence.finish = "length"
            chosen.append(Token(sequence.number, token, sequence.finish))
        for sequence, _ in begun:
            self._waiting.remove(sequence)
            self._promote(sequence)
        for sequence, _ in decoded + begun:
            if sequence.finish is not None:
                self._retire(sequence)
        return chosen

    def _read_prompts(self) -> list[tuple[Running, int]]:
        """The first tokens of sequences whose prompt was read to its end."""
        begun: list[tuple[Running, int]] = []
        left = self.chunk
        for sequence in list(self._waiting):
            logits_V = None
            while sequence.seen < len(sequence.tokens):
                alone = sequence.seen == len(sequence.tokens) - 1
                if alone and (sequence.seen or self._network.fast_prefill):
                    self._waiting.remove(sequence)
                    self._promote(sequence)
                    break
                end = self._border(sequence)
                if end - sequence.seen > left:
                    return begun
                left -= end - sequence.seen
                logits_V = self._network.prefill(
                    sequence.tokens[sequence.seen : end],
                    self._rows.index(sequence),
                    sequence.seen,
                    sequence.pages,
                    logits=end == len(sequence.tokens),
                )
                sequence.seen = end
                if end in sequence.marks:
                    last = [sequence.spare.pop()] if end % PAGE and sequence.spare else []
                    sequence.collected.append(self._copy(sequence, last))
            if logits_V is not None:
                begun.append((sequence, choose(logits_V, sequence.sampling, sequence.tokens)))
        return begun

    def _border(self, sequence: Running) -> int:
        """Where the next piece of a prompt ends."""
        marks = [mark for mark in sequence.marks if mark > sequence.seen]
        last = len(sequence.tokens) - self._network.fast_prefill
        return min((sequence.seen // self.chunk + 1) * self.chunk, last, *marks)

    def _decode(self, ready: list[Running]) -> list[tuple[Running, int]]:
        logits_BV = self._decoder(
            [sequence.tokens[-1] for sequence in ready],
            [sequence.seen for sequence in ready],
            [sequence.pages for sequence in ready],
        )
        for sequence in ready:
            sequence.seen += 1
        if all(sequence.sampling.greedy for sequence in ready):
            return list(zip(ready, logits_BV.argmax(-1).tolist(), strict=True))
        return [
            (sequence, choose(logits_V, sequence.sampling, sequence.tokens))
            for sequence, logits_V in zip(ready, logits_BV, strict=True)
        ]

    def _promote(self, sequence: Running) -> None:
        """Put a sequence among those that decode."""
        self._exchange(self._rows.index(sequence), self._ready)
        self._ready += 1

    def _retire(self, sequence: Running) -> None:
        """Take a sequence from among those that decode."""
        self._ready -= 1
        self._exchange(self._rows.index(sequence), self._ready)

    def _exchange(self, first: int, second: int) -> None:
        if first != second:
            self._states.swap(first, second)
            self._rows[first], self._rows[second] = self._rows[second], self._rows[first]

    def remove(self, sequence: int) -> None:
        """Let a sequence leave, finished or not, at once. ValueError for one that is not there."""
        leaving = self._get(sequence)
        if leaving in self._waiting:
            self._waiting.remove(leaving)
        elif leaving.finish is None:
            self._retire(leaving)
        self._rows[self._rows.index(leaving)] = None
        del self._sequences[sequence]
        self._book.give_back(leaving.pages + leaving.spare)
        for snapshot in leaving.collected:
            self.release(snapshot)

    def tokens_of(self, sequence: int) -> list[int]:
        """All its tokens, prompt and chosen. ValueError for one that is not there."""
        return list(self._get(sequence).tokens)

    def snapshot(self, sequence: int) -> Snapshot:
        """The state of a sequence as it is: behind all its tokens but the last, which no step has read yet; in the
        middle of a prompt, behind those that were worked on.

        Raises:
            EngineFull: no page is left for the copy of its last one.
            ValueError: it is not there, or nothing of its prompt was worked on.
        """
        source = self._get(sequence)
        if not source.seen:
            raise ValueError(f"sequence {sequence} has read none of its tokens yet; step first")
        return self._copy(source, self._book.take(1) if self._states.pages and source.seen % PAGE else [])

    def _copy(self, sequence: Running, last: list[int]) -> Snapshot:
        """The state of a sequence, its full pages shared, the begun one copied into `last`."""
        full = sequence.pages[: sequence.seen // PAGE]
        self._book.share(full)
        for page in last:
            self._states.copy_page(sequence.pages[len(full)], page)
        return self._keep(
            tuple(sequence.tokens[: sequence.seen]),
            self._states.read_row(self._rows.index(sequence)),
            full + last,
        )

    def _keep(self, tokens: tuple[int, ...], line: dict[str, Tensor], pages: list[int]) -> Snapshot:
        snapshot = Snapshot(tokens, self.bytes_of(len(tokens)), line, pages)
        self._snapshots.add(snapshot)
        return snapshot

    def collect(self, sequence: int) -> list[Snapshot]:
        """Hand over the snapshots taken at its `marks` since the last call, in their order; the caller releases them.
        Those that nobody collected leave with the sequence."""
        source = self._get(sequence)
        taken, source.collected = source.collected, []
        return taken

    def release(self, snapshot: Snapshot) -> None:
        """Give back what a snapshot holds. ValueError when that was done already, or for one of another engine."""
        self._check_held(snapshot)
        self._snapshots.remove(snapshot)
        self._book.give_back(snapshot.pages)

    def bytes_of(self, tokens: int) -> int:
        """Bytes of the tensors of a snapshot of so many tokens."""
        return self._states.row_bytes + tokens * self._states.token_bytes

    def export(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """The tensors of a snapshot by name: of rings [W, G, N], of layers that grow [tokens, G, N], of recurrences
        [H, N, N]. ValueError as `release`."""
        self._check_held(snapshot)
        return snapshot.line | self._states.read_pages(snapshot.pages, len(snapshot.tokens))

    def restore(self, tokens: Sequence[int], tensors: dict[str, Tensor]) -> Snapshot:
        """A snapshot of what `export` gave, here or elsewhere; the caller releases it.

        Raises:
            EngineFull: no room for its tokens.
            ValueError: names, shapes or dtypes that are not those of this model's states.
        """
        wanted = self._states.shapes_of_row(len(tokens))
        given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if given != wanted:
            odd = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
            raise ValueError(
                f"{odd[0]} is {given.get(odd[0], 'missing')}; this model's state of {len(tokens)} tokens has "
                f"{wanted.get(odd[0], 'no such tensor')}"
            )
        pages = self._book.take(self._book.pages_for(len(tokens)))
        self._states.write_pages(pages, tensors)
        line = {name: tensors[name].to(self._network.device, copy=True) for name in self._states.line_names()}
        return self._keep(tuple(tokens), line, pages)

    def memory(self) -> dict[str, int]:
        """Bytes: `weights`; `rows` (what every row holds at any length); `token` (one more token); `pages` (storage
        that grows, as allocated); `used` (the part of it that sequences and snapshots hold)."""
        page = PAGE * self._states.token_bytes
        return {
            "weights": self._network.weight_bytes,
            "rows": self._states.rows * self._states.row_bytes,
            "token": self._states.token_bytes,
            "pages": self._states.capacity * page,
            "used": self._book.held * page,
        }

    def _get(self, sequence: int) -> Running:
        if sequence not in self._sequences:
            raise ValueError(f"no sequence {sequence} is here; it was removed or never added")
        return self._sequences[sequence]

    def _check_held(self, snapshot: Snapshot) -> None:
        if snapshot not in self._snapshots:
            raise ValueError(
                f"the snapshot of {len(snapshot.tokens)} tokens is not one of this engine, or was released"
            )
