"""Reading the loss on a head off any function of a batch, and proving that what was read is that function.

The function is a module's training step (`read_step`) or a given loss on the module's forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.head import Head, HeadCall, record_calls, unsuitable_head
from lightning_muter.model.known_losses import Known, recognise
from lightning_muter.model.leaves import flatten, rows
from lightning_muter.model.loss_identity import loss_identity
from lightning_muter.model.losses import Loss, per_sample
from lightning_muter.model.own_attack import read_own_attack, takes_the_last
from lightning_muter.model.penalty import read_penalty, without
from lightning_muter.model.plain_mean import plain_mean_of
from lightning_muter.model.reading import Layout, Reading, algebra
from lightning_muter.model.replay import undone
from lightning_muter.model.row_loss import RowLoss
from lightning_muter.model.rowwise import BatchLoss, Probe, convex, denominator, points, shares
from lightning_muter.model.traced import refuse, storages, trace

#: Relative difference between what was read and the function itself, by the precision of the module.
_EQUAL = {torch.float64: 1e-9, torch.float32: 1e-5}
_FEW = (6, 4)
WAY_OUT = (
    "Nothing was changed. Pass loss=callable(logits, y, reduction='none') to say what the head is to be trained on and "
    "unlearned in."
)

Run = Callable[[Any], Tensor]


@dataclass
class _Seen:
    """One run of a step: its loss, its calls of linear layers in order, the leaves it was run with."""

    loss: Tensor
    calls: list[HeadCall]
    leaves: list[Any]


class Reader:
    """Reads ``run(batch) -> scalar``, which goes through ``module`` and its head once; ``what``: its name in messages; ``fixed``: the
    head itself is not asked for, only what follows it (to be climbed): it may be frozen, tied or adapted."""

    def __init__(
        self,
        module: nn.Module,
        batch: Any,
        run: Run,
        inputs: Any = None,
        what: str = "training_step",
        *,
        fixed: bool = False,
    ) -> None:
        self.module, self.run, self.inputs, self.what, self.fixed = module, run, inputs, what, fixed
        self.names, self.leaves, self.rebuild = flatten(batch)
        self.dtype = next(module.parameters()).dtype
        first = next((v for v in self.leaves if isinstance(v, Tensor)), None)
        if first is None:
            raise UnsuitableError(f"The batch holds no tensors (leaves {self.names}): nothing in it can be perturbed.")
        self.algebra = algebra(first.device)
        self.penalty: dict[str, float] = {}
        self._varies = False

    def read(self, rows_per_step: int | None) -> Reading:
        with undone(self.module):
            seen = self._see()
            try:
                call = self._head_call(seen)
            except RuntimeError as error:  # an in-place operation that autograd cannot undo, ...
                raise UnsuitableError(
                    f"The loss of {self.what} has no gradient ({str(error).splitlines()[0]}), so that it cannot be trained either."
                ) from error
            return self._read_head(call, seen, rows_per_step)

    # -- what runs ---------------------------------------------------------------------------------------------------

    def _see(self) -> _Seen:
        """Run the step once, with gradients to every floating leaf."""
        leaves = [
            v.detach().clone().requires_grad_(True) if isinstance(v, Tensor) and v.is_floating_point() else v
            for v in self.leaves
        ]
        with record_calls(self.module) as calls, _copied_outputs(self.module):
            loss = self._ran(leaves)
        if not bool(torch.isfinite(loss.detach())):
            raise UnsuitableError("The loss is NaN or infinite on the first samples. Check data and weights.")
        return _Seen(loss, calls, leaves)

    def _ran(self, leaves: list[Any]) -> Tensor:
        try:
            return self.run(self.rebuild(_copied(leaves)))
        except (UnsuitableError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsuitableError(
                f"{self.what} could not be replayed outside of training ({type(error).__name__}: {str(error)[:200]}). {WAY_OUT}"
            ) from error

    def _head_call(self, seen: _Seen) -> HeadCall:
        """The last linear layer called whose output the loss depends on."""
        if not seen.calls:
            raise UnsuitableError(
                f"{self.what} calls no nn.Linear: end the model with one, whose output the loss takes."
            )
        for call in reversed([c for c in seen.calls if c.output.requires_grad]):
            (slope,) = torch.autograd.grad(seen.loss, call.output, retain_graph=True, allow_unused=True)
            if slope is not None:
                return call
        raise UnsuitableError(
            f"The loss of {self.what} depends on no nn.Linear that the step calls: nothing to unlearn."
        )

    # -- one head ----------------------------------------------------------------------------------------------------

    def _read_head(self, call: HeadCall, seen: _Seen, rows_per_step: int | None) -> Reading:
        times = sum(c.linear is call.linear for c in seen.calls)
        if times > 1 and takes_the_last(seen.loss, seen.calls, call.linear):
            reading = read_own_attack(
                self.module, self._ran, call, times, self.names, self.leaves, self._probes(len(call.output))
            )
            reading.run, reading.example = self.run, self.rebuild(self.leaves)
            reading.rows_per_step = rows_per_step
            return reading
        if times > 1:
            raise UnsuitableError(
                f"The head {call.name!r} is called {times} times in one {self.what} (two forwards: consistency, TRADES, mixing, an "
                f"attack written into the step): its loss is no function of one output. Let AdversarialTraining attack. {WAY_OUT}"
            )
        reasons = unsuitable_head(self.module, call)
        if reasons and not (self.fixed and call.inputs.dim() == 2):
            raise UnsuitableError(
                f"The layer {call.name!r} gives what the loss takes but cannot serve as the head:\n"
                + "\n".join(f"- {r}" for r in reasons)
            )
        n = len(call.output)
        at = self._input(call, seen, n)
        head = Head(call.name, call.linear)
        k = call.linear.out_features
        if few := read_penalty(self.module, self._step(head), self._probes(n)[:1], k):
            self.penalty = read_penalty(self.module, self._step(head), self._of_a_step(n, rows_per_step), k)
            self._varies = any(abs(self.penalty.get(name, c) - c) > 1e-3 * c for name, c in few.items())
        first: UnsuitableError | None = None
        for reading in self._readings(head, call, at, n, rows_per_step):
            try:
                self._look_at_features(reading, call, Probe(self.leaves, n), at)
                self._verify(reading, call, seen, Probe(self.leaves, n))
            except UnsuitableError as error:
                first = first or error
            else:
                reading.penalty = self.penalty
                self._note(reading)
                return reading
        assert first is not None
        raise first

    def _readings(self, head: Head, call: HeadCall, at: int, n: int, rows_per_step: int | None) -> Iterator[Reading]:
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

    def _quick(self, head: Head, call: HeadCall, at: int, n: int, rows_per_step: int | None) -> Reading | None:
        """Where the step is the plain mean of a known loss, it is traced when its rows are first asked one by one."""
        step, probes = self._step(head), self._probes(n)
        labels = [i for i, v in enumerate(self.leaves) if i != at and rows(v, n)]
        try:
            told = plain_mean_of(step, probes, labels, call.linear.out_features, self.dtype)
        except Exception:  # of the step, on other rows
            told = None
        if told is None:
            return None
        known, scale = told

        def traced() -> BatchLoss:
            with undone(self.module):
                return next(self._losses(head, call, at, n))[0]

        return Reading(
            self.module, self.run, head, Layout(self.names, at, labels), known.loss, loss_identity(known.loss), _Later(traced),
            "rows", probes[0].rows(torch.tensor([0])), self.rebuild(self.leaves), known, rows_per_step=rows_per_step, uniform=scale,
        )  # fmt: skip

    def _traced(
        self, head: Head, call: HeadCall, of: tuple[BatchLoss, list[int]], at: int, rows_per_step: int | None
    ) -> Reading:
        batch_loss, uses = of
        n = len(call.output)
        probes = self._probes(n)
        k, device = call.linear.out_features, call.output.device
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

    def _input(self, call: HeadCall, seen: _Seen, n: int) -> int:
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

    def _losses(self, head: Head, call: HeadCall, at: int, n: int) -> Iterator[tuple[BatchLoss, list[int]]]:
        """L(z, leaves) and the leaves it uses: traced; then (where the step looks at values) the step itself, replayed."""
        k, device, whole = call.linear.out_features, call.output.device, Probe(self.leaves, n)
        step = self._step(head)

        def copies(count: int) -> tuple[Tensor, list[Any]]:
            rows = torch.tensor([0, n // 2, n - 1]).repeat(count)
            return points(len(rows), k, self.dtype, device, count), whole.rows(rows).leaves

        try:  # more than one copy: a selection of a single row is another operation than one of several
            named = storages(self.module)
            with without(self.module, self.penalty):  # the graph keeps what it meets
                graph = trace(step, (copies(2), copies(3)), self.algebra, named)
        except UnsuitableError:
            raise
        except Exception:
            pass
        else:
            refuse(graph, call.name, at)
            yield graph, graph.uses
        yield _Replayed(step, self.dtype), [i for i, v in enumerate(self.leaves) if i != at and rows(v, n)]

    def _step(self, head: Head) -> Callable[..., Tensor]:
        """The step as a function of the head's output and the leaves of a batch."""

        def step(z: Tensor, *leaves: Any) -> Tensor:
            with _answering(head.linear, z), without(self.module, self.penalty):
                return self.run(self.rebuild(_copied(leaves)))

        return step

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

    def _of_a_step(self, n: int, rows_per_step: int | None) -> list[Probe]:
        """Two batches as large as those of training, where that is known: a penalty may be divided by their rows."""
        if rows_per_step is None and self.fixed:  # what is climbed is the loss alone
            rows_per_step = n
        if rows_per_step is None:
            return self._probes(n)
        whole, at = Probe(self.leaves, n), torch.arange(rows_per_step)
        return [whole.rows(at % n), whole.rows((at + n // 2) % n)]

    def _probes(self, n: int) -> list[Probe]:
        whole = Probe(self.leaves, n)
        few = max(2, min(_FEW[0], n))
        first = torch.arange(few) % n
        second = torch.arange(max(2, min(_FEW[1], few - 1)) if few > 2 else 3).flip(0) % n
        second = (n - 1 - second) % n
        return [whole.rows(first), whole.rows(second)]

    # -- the way to the head ---------------------------------------------------------------------------------------------

    def _look_at_features(self, reading: Reading, call: HeadCall, whole: Probe, at: int) -> None:
        """Whether phi is a function of the input alone, and whether ``module(x)`` is it."""
        x = self.leaves[at]
        phi = call.inputs.detach()
        near = 1e-6 if self.dtype == torch.float64 else 1e-2 if self.dtype in (torch.float16, torch.bfloat16) else 1e-4
        scale = float(phi.abs().max()) + 1e-30

        def differs(other: Tensor) -> bool:
            return other.shape != phi.shape or bool(((other - phi).abs() > near * scale).any())

        with torch.no_grad():
            reading.direct = False
            torch.manual_seed(1)
            if differs(reading.features(x)):
                raise UnsuitableError(
                    "The head's input is another one at every run (noise, augmentation or dropout written into it): a "
                    "sample that was trained on cannot be found again. Augment once, in the data set."
                )
            if whole.n > 1:
                turned = torch.roll(torch.arange(whole.n), 1)
                moved = whole.rows(turned)
                moved.leaves[at] = x
                reading.example = self.rebuild(moved.leaves)
                other = reading.features(x)
                reading.example = self.rebuild(self.leaves)
                if differs(other):
                    raise UnsuitableError(
                        "The head's input depends on other entries of the batch than the input that is perturbed. Put them into one "
                        "tensor with it."
                    )
            try:
                reading.direct = True
                reading.direct = not differs(reading.features(x))
            except Exception:
                reading.direct = False
            if reading.direct and reading.known is not None:
                reading.plain = self._is_plain(reading, x, whole)

    def _is_plain(self, reading: Reading, x: Tensor, whole: Probe) -> bool:
        """Whether cross-entropy of what forward returns is the loss that was read."""
        if loss_identity(reading.loss) != loss_identity(torch.nn.functional.cross_entropy):
            return False
        out = self.module(x)
        y = reading.labels(whole)
        if not isinstance(out, Tensor) or out.dim() != 2 or y.is_floating_point():
            return False
        z = reading.logits(x)
        if out.shape != z.shape:
            return False
        apart = torch.nn.functional.cross_entropy(out, y, reduction="none") - torch.nn.functional.cross_entropy(
            z, y, reduction="none"
        )
        return bool((apart.abs() < 1e-3 * (1 + z.abs().max())).all())

    # -- the proof ---------------------------------------------------------------------------------------------------

    def _verify(self, reading: Reading, call: HeadCall, seen: _Seen, whole: Probe) -> None:
        """Value and gradient in the head, of the step and of what was read, on two batches, at the weights and at moved ones."""
        near = max(_EQUAL.get(d, 2e-2) for d in (self.dtype, seen.loss.dtype))
        linear = call.linear
        for probe in (whole, *self._probes(whole.n)):
            for moved in (0.0, 0.3) if probe is not whole else (0.0, 0.3, 4.0):
                generator = torch.Generator().manual_seed(7)
                phi = reading.features(probe.leaves[reading.layout.input]).detach()
                z = linear(phi).detach()
                noise = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
                z = (z + moved * noise).requires_grad_(True)
                with _answering(linear, z), without(self.module, self.penalty):
                    there = self._ran(probe.leaves)
                (slope,) = torch.autograd.grad(there, z)
                there = there.detach()
                here, like = objective_at(reading, probe, z.detach().to(self.algebra))
                # a loss that is nearly 0 is the difference of large numbers: told to their rounding, no better
                rounding = 8 * torch.finfo(z.dtype).eps * (1 + float(z.detach().abs().max()))
                value = abs(float(there) - float(here)) - rounding
                gradient = float((slope.to(like) - like).abs().max()) - rounding / probe.n
                size = float(slope.abs().max())
                if not (value <= near * max(abs(float(there)), 1e-3) and gradient <= 10 * near * size + 1e-12):
                    gradient = max(gradient, 0.0) / (size + 1e-30)
                    raise UnsuitableError(
                        f"The loss that was read off {self.what} ({reading.identity}) differs from the step itself: value "
                        f"{float(here):.6g} instead of {float(there):.6g}, gradient off by {gradient:.1e} of its size. {WAY_OUT}"
                    )

    def _note(self, reading: Reading) -> None:
        if reading.denominator == "sum":
            reading.notes.append(
                "The loss sums over the batch, so that weight decay counts once per batch: the objective is taken for batches of "
                f"{reading.rows_per_step or 'one'} rows. Use a mean over the batch."
            )
        if reading.denominator == "weights":
            reading.notes.append(
                "The loss divides by the weights (or the kept rows) of each batch: the objective is taken for the whole data set, "
                "sum w_i l_i / sum w_i, which batches approach as they grow. Exact: reduction='none' and a mean over the rows."
            )
        if self._varies:
            reading.notes.append(
                f"{self.what} adds an L2 penalty by itself and divides it by the rows of the batch: the objective is taken for batches "
                f"of {reading.rows_per_step} rows. Add it undivided, or use the optimiser's weight_decay."
            )
        if not reading.convex:
            reading.notes.append(
                f"The loss ({reading.identity}) is not convex in the head's output: no certificate, and the minimiser that is "
                "polished to may be one of several."
            )


class _Later:
    """L(z, leaves), traced at the first need."""

    def __init__(self, trace: Callable[[], BatchLoss]) -> None:
        self._trace = trace
        self._found: BatchLoss | None = None

    @property
    def by_row(self) -> bool:
        return getattr(self._loss(), "by_row", False)

    def _loss(self) -> BatchLoss:
        if self._found is None:
            self._found = self._trace()
        return self._found

    def __call__(self, z: Tensor, leaves: list[Any]) -> Tensor:
        return self._loss()(z, leaves)


class _Replayed:
    """L(z, leaves) by the step itself."""

    by_row = True

    def __init__(self, step: Callable[..., Tensor], dtype: torch.dtype) -> None:
        self.step, self.dtype = step, dtype

    def __call__(self, z: Tensor, leaves: list[Any]) -> Tensor:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of small batches
                return self.step(z.to(self.dtype), *leaves).to(z.dtype)
        except UnsuitableError:
            raise
        except Exception as error:
            raise UnsuitableError(
                f"training_step looks at values and fails on a batch of {len(z)} of the same rows ({type(error).__name__}: "
                f"{str(error)[:200]}): its loss cannot be read row by row. {WAY_OUT}"
            ) from error


@contextmanager
def _answering(linear: nn.Module, z: Tensor) -> Iterator[None]:
    """Inside, the head answers z."""
    handle = linear.register_forward_hook(lambda *_: z.clone())  # the step may work in place on it
    try:
        yield
    finally:
        handle.remove()


def _copied(leaves: Iterable[Any]) -> list[Any]:
    """The step may work in place."""
    return [v.clone() if isinstance(v, Tensor) else v for v in leaves]


@contextmanager
def _copied_outputs(module: nn.Module) -> Iterator[None]:
    """Inside, what follows a linear layer works on a copy of its output: the step may work in place."""
    handles = [
        m.register_forward_hook(lambda *call: call[-1].clone()) for m in module.modules() if isinstance(m, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def objective_at(reading: Reading, probe: Probe, z: Tensor) -> tuple[Tensor, Tensor]:
    """sum c_i l_i / sum d_i at z, and its gradient."""
    if reading.uniform is None:
        y, weight, mass = reading.weighed(probe)
    else:
        y, mass = reading.labels(probe), torch.ones_like(z[:, 0])
        weight = reading.uniform * mass
    point = z.clone().requires_grad_(True)
    values = per_sample(reading.loss, point, y).to(z.dtype)
    values = torch.where(weight > 0, values, torch.zeros_like(values))
    total = (values * weight.to(z)).sum() / (1.0 if reading.denominator == "sum" else mass.to(z).sum())
    (slope,) = torch.autograd.grad(total, point)
    return total.detach(), slope


def _named(name: str, wanted: Any) -> bool:
    return name in (f"[{wanted!r}]", wanted)
