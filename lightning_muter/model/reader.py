"""Reading the loss on a head off any function of a batch, and proving that what was read is that function.

The function is a module's training step (`read_step`) or a given loss on the module's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.batch_losses import Later, Replayed
from lightning_muter.model.cut_layer import CutLayerSearch, calls_of
from lightning_muter.model.head import CutLayer, HeadCall
from lightning_muter.model.known_losses import Known, recognise
from lightning_muter.model.leaves import rows
from lightning_muter.model.loss_identity import in_words, loss_identity
from lightning_muter.model.losses import Loss
from lightning_muter.model.own_attack import read_own_attack, takes_the_last
from lightning_muter.model.own_step import WAY_OUT, OwnStep, Run, Seen
from lightning_muter.model.penalty import without
from lightning_muter.model.plain_mean import plain_mean_of
from lightning_muter.model.proof import look_at_features, verify
from lightning_muter.model.reading import Layout, Reading, algebra
from lightning_muter.model.replay import undone
from lightning_muter.model.row_loss import RowLoss
from lightning_muter.model.rowwise import BatchLoss, Probe, convex, denominator, points, shares
from lightning_muter.model.traced import refuse, storages, trace
from lightning_muter.model.untraced import Untraced


class Reader:
    """Reads ``run(batch) -> scalar``, which goes through ``module`` and its head once.

    Args:
        what: its name in messages.
        fixed: the head itself is not asked for, only what follows it (to be climbed): it may be frozen, tied or adapted.
        whole: nothing of the head is asked for but its output: where it is no linear layer of its own, or trained parameters lie
            behind it, the step is cut at the output of another module.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Any,
        run: Run,
        inputs: Any = None,
        what: str = "training_step",
        *,
        fixed: bool = False,
        whole: bool = False,
    ) -> None:
        self.module, self.run, self.inputs, self.what, self.fixed, self.whole = module, run, inputs, what, fixed, whole
        self.own = OwnStep(module, batch, run, what)
        self.names, self.leaves, self.rebuild = self.own.names, self.own.leaves, self.own.rebuild
        first = next((v for v in self.leaves if isinstance(v, Tensor)), None)
        if first is None:
            raise UnsuitableError(f"The batch holds no tensors (leaves {self.names}): nothing in it can be perturbed.")
        self.dtype, self.algebra = self.own.dtype, algebra(first.device)

    def read(self, rows_per_step: int | None) -> Reading:
        with undone(self.module):
            search = CutLayerSearch(self.own, rows_per_step, fixed=self.fixed, whole=self.whole)
            seen, call = search.place()
            n, times = len(call.output), calls_of(call, seen)
            if times > 1:
                return self._of_own_attack(seen, call, times, rows_per_step)
            search.insist(call)
            at = self._input(call, seen, n)
            note = search.read_penalty(call)
            first: UnsuitableError | None = None
            for reading in self._readings(call.head, call, at, n, rows_per_step):
                try:
                    look_at_features(self.own, reading, call, at)
                    verify(self.own, reading, call, seen.loss.dtype)
                except UnsuitableError as error:
                    first = first or error
                else:
                    search.refuse_layers_behind(call, reading.convex)
                    reading.penalty = self.own.penalty
                    reading.notes += [*note, *_notes(reading)]
                    return reading
            assert first is not None
            raise first

    def _of_own_attack(self, seen: Seen, call: HeadCall, times: int, rows_per_step: int | None) -> Reading:
        """Of a step that calls its head several times, which an attack written into it does."""
        if not takes_the_last(seen.loss, seen.calls, call.linear):
            raise UnsuitableError(
                f"The head {call.name!r} is called {times} times in one {self.what} (two forwards: consistency, TRADES, mixing, an "
                f"attack written into the step): its loss is no function of one output. Let AdversarialTraining attack. {WAY_OUT}"
            )
        probes = self.own.probes(len(call.output))
        reading = read_own_attack(self.module, self.own.ran, call, times, self.names, self.leaves, probes)
        reading.run, reading.example = self.run, self.rebuild(self.leaves)
        reading.rows_per_step = rows_per_step
        return reading

    def _readings(
        self, head: CutLayer, call: HeadCall, at: int, n: int, rows_per_step: int | None
    ) -> Iterator[Reading]:
        """What the step may be, the quickest to be told first; none is proved yet.

        Raises:
            UnsuitableError: it cannot be any; the message is of the first that was tried.
        """
        quick = self._quick(head, call, at, n, rows_per_step)
        if quick is not None:
            yield quick
        first: UnsuitableError | None = None
        for loss in self._losses(head, call, at, n):
            try:
                found = self._traced(head, call, loss, at, rows_per_step)
            except UnsuitableError as error:
                first = first or error
            else:
                yield found
        if first is not None:
            raise first

    def _quick(self, head: CutLayer, call: HeadCall, at: int, n: int, rows_per_step: int | None) -> Reading | None:
        """Where the step is the plain mean of a known loss, it is traced when its rows are first asked one by one."""
        step, probes = self.own.with_output(head.layer), self.own.probes(n)
        labels = [i for i, v in enumerate(self.leaves) if i != at and rows(v, n)]
        try:
            told = plain_mean_of(step, probes, labels, head.outputs, self.dtype)
        except Exception:  # of the step, on other rows
            told = None
        if told is None:
            return None
        known, scale = told

        def traced() -> BatchLoss:
            with undone(self.module):
                return next(self._losses(head, call, at, n))[0]

        return Reading(
            self.module, self.run, head, Layout(self.names, at, labels), known.loss, loss_identity(known.loss), Later(traced),
            "rows", probes[0].rows(torch.tensor([0])), self.rebuild(self.leaves), known, rows_per_step=rows_per_step, uniform=scale,
        )  # fmt: skip

    def _traced(
        self, head: CutLayer, call: HeadCall, of: tuple[BatchLoss, list[int]], at: int, rows_per_step: int | None
    ) -> Reading:
        batch_loss, uses = of
        n = len(call.output)
        probes = self.own.probes(n)
        k, device = head.outputs, call.output.device
        found = [shares(batch_loss, p, k, self.algebra, device) for p in probes]
        kind = denominator(found, probes)
        counts = [s.active for s in found]
        known = recognise(batch_loss, probes[0], uses, k, counts[0], self.algebra)
        reference = probes[0].rows(counts[0].nonzero()[:1, 0])
        graph_identity = getattr(batch_loss, "identity", None)
        uniform = self._same_for_all(known, batch_loss, probes, kind, counts) if graph_identity is None else None
        identity = loss_identity(known.loss) if known is not None else f"traced:{str(graph_identity)[:32]}"
        loss: Loss = known.loss if known is not None else RowLoss(batch_loss, probes[0], uses, identity)
        return Reading(
            self.module, self.run, head, Layout(self.names, at, uses), loss, identity, batch_loss, kind, reference,
            self.rebuild(self.leaves), known, rows_per_step=rows_per_step, uniform=uniform,
            convex=known is not None or convex(batch_loss, probes[0].rows(counts[0].nonzero()[:, 0]), k, self.algebra, device),
        )  # fmt: skip

    def _input(self, call: HeadCall, seen: Seen, n: int) -> int:
        """The leaf that reaches the head."""
        floating = [i for i, v in enumerate(seen.leaves) if isinstance(v, Tensor) and v.requires_grad and rows(v, n)]
        try:
            slopes = torch.autograd.grad(
                call.inputs.sum(), [seen.leaves[i] for i in floating], retain_graph=True, allow_unused=True
            ) if floating and call.inputs.requires_grad else [None] * len(floating)  # fmt: skip
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise UnsuitableError(
                f"The head's input has no gradient in the inputs of the batch, so that nothing can attack them: {error}. A layer "
                "works in place on what another needs: write it without inplace=True."
            ) from error
        reach = [i for i, slope in zip(floating, slopes, strict=True) if slope is not None]
        if self.inputs is not None:
            wanted = [i for i in reach if _named(self.names[i], self.inputs)]
            if len(wanted) != 1:
                raise UnsuitableError(
                    f"inputs={self.inputs!r} is none of the leaves that reach the head, {[self.names[i] for i in reach]}."
                )
            return wanted[0]
        if len(reach) == 1:
            return reach[0]
        if not reach:
            raise UnsuitableError(
                f"No floating tensor of the batch (leaves {self.names}) reaches the head {call.name!r} with a gradient: integer "
                "inputs (tokens, bytes) and inputs that are detached or drawn in the step cannot be perturbed. Convert integers to "
                "floats in the data set; where the step or forward runs the backbone under torch.no_grad(), freeze it with "
                "requires_grad_(False) instead."
            )
        raise UnsuitableError(
            f"Several tensors of the batch reach the head, {[self.names[i] for i in reach]}: which one is perturbed? Put them into "
            "one tensor, or pass inputs= (key or position)."
        )

    def _losses(self, head: CutLayer, call: HeadCall, at: int, n: int) -> Iterator[tuple[BatchLoss, list[int]]]:
        """L(z, leaves) and the leaves it uses: traced; then (where the step looks at values) the step itself, replayed."""
        k, device, whole = head.outputs, call.output.device, Probe(self.leaves, n)
        step = self.own.with_output(head.layer)

        def copies(count: int) -> tuple[Tensor, list[Any]]:
            rows = torch.tensor([0, n // 2, n - 1]).repeat(count)
            return points(len(rows), k, self.dtype, device, count), whole.rows(rows).leaves

        try:  # more than one copy: a selection of a single row is another operation than one of several
            named = storages(self.module)
            with without(self.module, self.own.penalty):  # the graph keeps what it meets
                graph = trace(step, (copies(2), copies(3)), self.algebra, named, Untraced(self.module, head.layer))
        except UnsuitableError:
            raise
        except Exception:
            pass
        else:
            refuse(graph, call.name, at)
            yield graph, graph.uses
        yield Replayed(step, self.dtype), [i for i, v in enumerate(self.leaves) if i != at and rows(v, n)]

    def _same_for_all(
        self, known: Known | None, batch_loss: BatchLoss, probes: list[Probe], kind: str, counts: list[Tensor]
    ) -> float:
        """c_i of a step that can only be replayed: its rows are not looked at one by one, so it must be the same for all."""
        found = (
            None
            if known is None
            else [known.factors(batch_loss, p, c, self.algebra) for p, c in zip(probes, counts, strict=True)]
        )
        values = torch.cat([f for f in found or [] if f is not None] or [torch.zeros(0)])
        if kind == "weights" or len(values) == 0 or bool(((values - values[0]).abs() > 1e-3 * values[0].abs()).any()):
            raise UnsuitableError(
                f"{self.what} looks at values while it computes its loss (a branch on a tensor, .numpy(), ...), and the loss is no "
                f"plain mean of a known one: it cannot be read off. {WAY_OUT}"
            )
        mean, near = float(values.mean()), round(float(values.mean()), 5)
        return near if abs(mean - near) < 1e-6 else mean


def _notes(reading: Reading) -> list[str]:
    """What is to be said of an objective that is not quite the step's, or not convex."""
    notes = []
    if reading.denominator == "sum":
        notes.append(
            "The loss sums over the batch, so that weight decay counts once per batch: the objective is taken for batches of "
            f"{reading.rows_per_step or 'one'} rows. Use a mean over the batch."
        )
    if reading.denominator == "weights":
        notes.append(
            "The loss divides by the weights (or the kept rows) of each batch: the objective is taken for the whole data set, "
            "sum w_i l_i / sum w_i, which batches approach as they grow. Exact: reduction='none' and a mean over the rows."
        )
    if not reading.convex:
        first = ", ".join(getattr(reading.batch_loss, "first", []))
        through = f" (it goes through {first} first)" if first else ""
        notes.append(
            f"The loss ({in_words(reading.identity)}) is not convex in the head's output{through}: no certificate, and the minimiser "
            "that is polished to may be one of several. An activation behind the last linear layer, if it is not meant, is left out."
        )
    return notes


def _named(name: str, wanted: Any) -> bool:
    return name in (f"[{wanted!r}]", wanted)
