"""The K-FAC family as one torch optimizer: Algorithms 1, 4, 5 and 7, and Algorithm 8 as a switch.

    optimizer = KFAC(model, "B-KFAC", lr=0.3, steps_per_epoch=len(loader))
    for x, y in loader:
        optimizer.zero_grad()
        loss_function(model(x), y).backward()
        optimizer.step()

Step k, in this order: the EA factors and the processes take the columns of this step, once in T_updt steps; then
each layer's step is `S = Gamma^-1 Mat(g) A^-1` (Algorithm 1 l.15-18), clipped; then weight decay, momentum and the
learning rate act as in SGD. The processes are those of `kfacerr.processes`, the error study's own.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..exceptions import InputError
from ..inverse import CONTINUATIONS, precondition, precondition_linear
from ..stream import Columns
from .distributed import Processes, update_together
from .hooks import ColumnHooks, _Hook, _unfollowable
from .layers import FALLBACK, Factor, Layer, Tally, map_tensors
from .lifetime import weakly, without_hooks
from .likelihoods import LIKELIHOODS
from .linear import forget, formed, held
from .policy import PRESETS, SGD, HyperParameters, LayerPolicy, Schedules, check_policy, is_number
from .precision import full_precision, rounding
from .product import Product
from .scaling import lost_scale
from .wrappers import unwrapped

__all__ = ["KFAC"]

logger = logging.getLogger(__name__)

_GROUP_DEFAULTS = ("momentum", "weight_decay", "clip")
Step = Tensor | Product
Scheduled = float | Callable[[int], float]


class KFAC(torch.optim.Optimizer):
    """K-FAC, R-KFAC, B-KFAC, B-R-KFAC and B-KFAC-C (Puiu, "Brand New K-FACs"), with a process per K-factor.

    Linear layers and Conv2d (groups = 1) are preconditioned. Everything else that is trained, among it batch norm,
    embeddings, grouped convolutions, and layers whose weight is shared or computed, gets plain SGD with the same
    learning rate, momentum and weight decay; the log says once what and why. So does a layer, step by step, whose
    factor is zero or has no estimate yet: its step is the plain gradient.

    The columns are caught by hooks; a user calls `zero_grad`, `backward` and `step`. The micro-batches of a
    gradient accumulation act as the full batch. A batch whose backward came but whose `step()` did not, as after a
    GradScaler's overflow, is dropped by `zero_grad()`.

    Where one step's gradients or columns have NaN or Inf, the step is skipped: parameters, factors, momentum and
    `k` stay as they are. Factors are float32 (float64 for float64 models) with TF32 and autocast off, whatever the
    model's precision.

    Several processes: with torch.distributed initialised, the model wrapped in DistributedDataParallel, and a loss
    that is a mean over each process's own batch, all keep one set of factors and take the step of one process with
    all their batches; see `kfacerr.torch.distributed`. Layer names, and so checkpoints, are those of the model
    inside. Every process makes an optimizer with the same arguments, and calls the same steps.

    A `FactoredLinear` (`kfacerr.torch.factored`) gets Algorithm 8 without being asked to, and its gradient is not
    formed unless something reads .grad. The step uses it up: after it .grad is None.

    Scaling: batch means as in §2, convolutions as in Grosse & Martens (2016), see `kfacerr.torch.layers`. The loss
    must be a mean over the batch. Damping (§6): lam = phi_lambda * lambda_max of the factor's own representation.

    Args:
        model: the network, called as `model(...)`, or its DistributedDataParallel.
        algorithm: a preset by the paper's name: "K-FAC", "R-KFAC", "SRE-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C".
            The B- presets use theirs on the first fully connected layer and R-KFAC on all others (§3.5). A factor
            with r + n >= d gets R-KFAC in its place.
        params: parameters or groups, as for any optimizer; the model's trainable ones by default. Groups may have
            their own lr, momentum, weight_decay and clip (of a layer: its weight's).
        lr: learning rate, alpha.
        policy: by layer name what differs from the preset: a name of `kfacerr.algorithms` with settings if wanted
            ("R-KFAC T_inv=10 rank=50"), "SGD", a function `FactorInfo -> Process` for a process of your own (the
            schedules below do not touch it), or {"A": ..., "G": ...} with one for each factor.
        steps_per_epoch: the epoch of step k is `k // steps_per_epoch`, unless you set `optimizer.epoch`.
        T_updt, T_inv, T_brand, T_rsvd, T_corct: periods in steps. T_brand is 25, and 125 for B-KFAC and B-KFAC-C,
            if None. These and the following up to `rho`, and `momentum`, `weight_decay` and `clip`, may each be a
            function of the epoch.
        phi_corct, rank, oversampling, n_pwr_it, phi_lambda, rho: of §6.
        clip: each layer's step is scaled by min(1, clip / rms(S)); None for no clipping.
        clip_by: "layer", or "kl" for one factor min(1, sqrt(clip / sum_l lr^2 <S_l, g_l>)) on all layers.
        weight_decay: decoupled from the preconditioning: added to the update, after the clip.
        momentum: as in SGD, of the clipped and decayed step.
        continuation: of the spectrum, "min" (§3.5), "none" or "trace".
        accumulate: Brand updates take the batches that T_brand skips, too, instead of dropping them.
        linear_application: Algorithm 8, True for every layer with n < min(d_A, d_G), or the names of some. The
            step is then made from this step's columns and not from .grad. A step where the two differ, because
            the gradient was clipped or changed otherwise, or has parts from elsewhere (a penalty in the loss), is
            taken by Algorithm 1, and the log says so once. .grad is formed all the same, but for a FactoredLinear.
        fisher: "empirical" or "sampled"; see `sample_fisher`.
        loss_scale: what the loss is multiplied with before `backward()`, while .grad is unscaled before `step()`;
            for a GradScaler pass `scaler.get_scale`. If it is left at 1, the first update refuses a .grad that is
            smaller than the columns' by one power of two in all layers, from 2^8 on: a scale that nobody declared.
        skip_nonfinite: look at every step for NaN and Inf, which makes the host wait for the device. Without it,
            only steps that update factors are looked at; GradScaler looks at them all anyway.
        seed: of the RSVD's sketches, the corrections' choices and the sampled labels.
        data_parallel: whether the processes of torch.distributed, if it is initialised, train one model; False if
            each trains its own.

    Attributes:
        k: number of steps taken.
        epoch: the epoch that schedules see; may be set.
        layers: the preconditioned layers by name.

    Raises:
        InputError: an unknown preset, layer, process or option, a value out of range, or nothing to train.
    """

    _agreed = False  # whether the processes' gradients were seen to be the same
    _scale_known = False  # whether .grad was seen to have the scale of the columns
    _rounding = 0.0  # of float32 products in the backward

    def __init__(
        self,
        model: nn.Module,
        algorithm: str = "R-KFAC",
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.3,
        policy: Mapping[str, LayerPolicy] | None = None,
        steps_per_epoch: int | None = None,
        T_updt: Scheduled = 25,
        T_inv: Scheduled = 250,
        T_brand: Scheduled | None = None,
        T_rsvd: Scheduled = 250,
        T_corct: Scheduled = 500,
        phi_corct: Scheduled = 0.5,
        rank: Scheduled = 220,
        oversampling: Scheduled = 10,
        n_pwr_it: Scheduled = 4,
        phi_lambda: Scheduled = 0.1,
        rho: Scheduled = 0.95,
        clip: Scheduled | None = 0.07,
        clip_by: str = "layer",
        weight_decay: Scheduled = 7e-4,
        momentum: Scheduled = 0.0,
        continuation: str = "min",
        accumulate: bool = False,
        linear_application: bool | Sequence[str] = False,
        fisher: str = "empirical",
        loss_scale: float | Callable[[], float] = 1.0,
        skip_nonfinite: bool = True,
        seed: int = 0,
        data_parallel: bool = True,
    ) -> None:
        _check_choice("algorithm", algorithm, PRESETS)
        _check_choice("continuation", continuation, CONTINUATIONS)
        _check_choice("clip_by", clip_by, ("layer", "kl"))
        _check_choice("fisher", fisher, ("empirical", "sampled"))
        if linear_application and fisher == "sampled":
            raise InputError(
                "linear_application (Algorithm 8) needs fisher='empirical': with sampled labels, G A^T is not the "
                "gradient"
            )
        if not isinstance(model, nn.Module):
            raise InputError(f"the model must be an nn.Module, got {type(model).__name__}")
        if policy is not None and not isinstance(policy, Mapping):
            raise InputError(f"policy must map layer names to choices, got {policy!r}")
        _check_setting("lr", lr)
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise InputError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        self.model = model = unwrapped(model)
        self.algorithm = algorithm
        self.policy = dict(policy or {})
        self.schedules = Schedules(
            {
                "T_updt": T_updt,
                "T_inv": T_inv,
                "T_brand": PRESETS[algorithm].T_brand if T_brand is None else T_brand,
                "T_rsvd": T_rsvd,
                "T_corct": T_corct,
                "phi_corct": phi_corct,
                "rank": rank,
                "oversampling": oversampling,
                "n_pwr_it": n_pwr_it,
                "phi_lambda": phi_lambda,
                "rho": rho,
            }
        )
        self.steps_per_epoch = steps_per_epoch
        self.clip_by = clip_by
        self.continuation = continuation
        self.accumulate = accumulate
        self.linear_application = linear_application
        self.fisher = fisher
        self.loss_scale = loss_scale
        self.skip_nonfinite = skip_nonfinite
        self.seed = seed
        self.data_parallel = data_parallel
        self.k = 0
        self.layers: dict[str, Layer] = {}
        self._epoch: int | None = None
        self._group_schedules: list[dict[str, Callable[[int], float]]] = []
        self._samples = 0  # micro-batches of the coming step that labels were drawn for
        self._said: set[str] = set()
        self._skipped = 0  # steps, for NaN or Inf
        self._unfit: dict[str, Tensor] = {}  # the last step whose S was not finite, by layer, on its device
        self._handle: Any = None
        self._open: list[ColumnHooks] = []
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
            if not params:
                raise InputError("the model has no trainable parameters")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "clip": clip})
        self._follow()

    # ---------------------------------------------------------------------------------------- the epoch

    @property
    def epoch(self) -> int:
        return self._epoch_of(self.k, self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = int(epoch)

    def _epoch_of(self, k: int, given: int | None) -> int:
        if given is not None:
            return given
        return 0 if self.steps_per_epoch is None else k // self.steps_per_epoch

    @property
    def hyper(self) -> HyperParameters:
        """The processes' hyper-parameters of the coming step.

        Raises:
            InputError: one is a function of the epoch, and nothing tells the epoch.
        """
        scheduled = self.schedules.vary or any(self._group_schedules)
        if scheduled and self._epoch is None and self.steps_per_epoch is None:
            raise InputError("schedules need the epoch: pass steps_per_epoch, or set optimizer.epoch")
        return self.schedules.at(self.epoch)

    # ----------------------------------------------------------------------------------------- following

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer. Layers whose weight comes in are preconditioned from now on."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        scheduled = {name: group[name] for name in _GROUP_DEFAULTS if callable(group[name])}
        self._group_schedules.append(scheduled)
        group.update({name: schedule(self.epoch) for name, schedule in scheduled.items()})
        _check_group(group)
        if self._handle is not None:
            self._follow()

    def _follow(self) -> None:
        """Hooks up the layers that can be preconditioned and are not yet; tells the log about the rest."""
        modules = dict(self.model.named_modules())
        for name in [*self.policy, *_names(self.linear_application)]:
            if name not in modules:
                raise InputError(f"the model has no layer {name!r}")
        for name, policy in self.policy.items():
            check_policy(name, policy)
            if policy != SGD and (reason := _unfollowable(modules[name])):
                raise InputError(f"layer {name!r} {reason}: it cannot be preconditioned")
        if self._handle is None:
            # Before the hooks of the layers, which refuse a forward while columns are waiting.
            self._handle = self.model.register_forward_pre_hook(_Hook(weakly(self._on_forward)), prepend=True)
            weakref.finalize(self, _remove, [self._handle], self._open).atexit = False
        mine = {p for group in self.param_groups for p in group["params"]}
        owners = Counter(p for module in modules.values() for p in module.parameters(recurse=False))
        fully_connected = (n for n, m in modules.items() if isinstance(m, nn.Linear))
        first_fc = next((n for n in fully_connected if not _why_plain(modules[n], "", mine, owners)), None)
        preset = PRESETS[self.algorithm]
        for name, module in modules.items():
            if name in self.layers or not any(p in mine for p in module.parameters(recurse=False)):
                continue
            policy = self.policy.get(name, preset.first_fc if name == first_fc else preset.others)
            plain = _why_plain(module, policy, mine, owners)
            if plain is not None:
                self._say(f"plain {name}", f"layer {name!r} {plain[0]}: plain SGD", plain[1])
                continue
            layer = Layer(self.model, name, module, policy, bias=module._parameters.get("bias") in mine)
            named = self.linear_application is True or name in _names(self.linear_application)
            if named or (layer.keeps_factors and self.fisher == "empirical"):
                layer.ask_linear()
            elif layer.keeps_factors:
                self._say(
                    f"sampled {name}",
                    f"layer {name!r}: fisher='sampled', where G A^T is not the gradient: Algorithm 1, and the "
                    "FactoredLinear's gradient is formed",
                )
            self.layers[name] = layer
            self._open.append(layer.hooks)
        for name in _names(self.linear_application):
            if name not in self.layers:
                raise InputError(f"layer {name!r} is not preconditioned: Algorithm 8 cannot apply to it")
        self._switch_hooks()

    def close(self) -> None:
        """Removes the hooks from the model, as does the end of the optimizer's life."""
        _remove([self._handle], self._open)

    def _say(self, key: str, message: str, level: int = logging.WARNING) -> None:
        """To the log, once."""
        if key not in self._said:
            self._said.add(key)
            logger.log(level, "%s", message)

    def _switch_hooks(self) -> None:
        """Columns are caught where the coming step needs them: in T_updt steps, and always for Algorithm 8."""
        try:
            updating = self.k % self.hyper.T_updt == 0
        except InputError:  # the epoch is not known yet; the step will say so
            updating = True
        for layer in self.layers.values():
            layer.hooks.enabled = updating or layer.linear is not False

    def _on_forward(self, model: nn.Module, args: Any) -> None:
        """Before a forward: takes the columns of an earlier micro-batch of the same step."""
        if not torch.is_grad_enabled():
            return
        if not any(layer.has_gradient for layer in self.layers.values()):
            self._discard()  # the gradients they belonged to are gone
        else:
            self._collect()
        self._switch_hooks()

    def _collect(self) -> None:
        for layer in self.layers.values():
            layer.loss_scale = self._loss_scale()
            if self.fisher == "empirical":
                layer.collect(layer.loss_scale)
            elif layer.hooks.pending():
                layer.hooks.forget()  # of the true labels

    def _discard(self) -> None:
        self._samples = 0
        for layer in self.layers.values():
            layer.discard()

    def _loss_scale(self) -> float:
        return float(self.loss_scale() if callable(self.loss_scale) else self.loss_scale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for any optimizer; drops the columns of the gradients it clears."""
        self._discard()
        for group in self.param_groups:
            forget(group["params"])  # before they are read, which would form them
        super().zero_grad(set_to_none)

    def sample_fisher(
        self, output: Tensor, likelihood: str | Callable[[Tensor, torch.Generator], Tensor] = "categorical"
    ) -> None:
        """For `fisher="sampled"`: the columns of labels drawn from the model, for E over y ~ p(y|x) in (2).

        Call it between the forward and `loss.backward()`, after `zero_grad()`, at each micro-batch. It costs one
        more backward in steps that update factors, and nothing in the others. .grad is not touched.

        Args:
            output: of the forward just done: logits (b, classes, ...), or means.
            likelihood: "categorical" (softmax over dimension 1), "gaussian" (unit variance), or a function of the
                output and a generator that draws labels and returns the mean of -log p over the batch.

        Raises:
            InputError: the optimizer was not made with fisher="sampled".
        """
        if self.fisher != "sampled":
            raise InputError("sample_fisher() needs an optimizer made with fisher='sampled'")
        if isinstance(likelihood, str):
            _check_choice("likelihood", likelihood, LIKELIHOODS)
            likelihood = LIKELIHOODS[likelihood]
        if self.k % self.hyper.T_updt:
            return
        team = Processes(self.data_parallel)
        own = [] if team.size == 1 else [team.rank]  # each process has samples of its own to draw for
        seeds = np.random.SeedSequence([self.seed, self.k, self._samples, *own])
        generator = torch.Generator(output.device).manual_seed(int(seeds.generate_state(1)[0]))
        self._samples += 1
        scale = self._loss_scale()  # keeps a half-precision backward in range
        with torch.autocast(output.device.type, enabled=False):
            loss = likelihood(output if output.dtype == torch.float64 else output.float(), generator)
        weights = [layer.weight for layer in self.layers.values()]
        torch.autograd.grad(loss * scale, weights, retain_graph=True, allow_unused=True)
        for layer in self.layers.values():
            layer.collect(scale)

    # ---------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the module's docstring.

        Waits for the device where it decomposes, and to look for NaN and Inf (`skip_nonfinite`).

        Raises:
            InputError: a schedule lacks the epoch or gives a value out of range; with fisher="sampled",
                `sample_fisher` was not called where factors are updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hyper = self.hyper
        self._collect()
        if self.layers:
            device = next(iter(self.layers.values())).weight.device
            with full_precision(device.type) as self._rounding:
                taken = self._step(hyper)
        else:
            taken = self._step(hyper)
        self._discard()
        if taken:
            self.k += 1
        self._switch_hooks()
        return loss

    def _step(self, hyper: HyperParameters) -> bool:
        """Whether the step was taken, and not skipped for NaN or Inf."""
        team = Processes(self.data_parallel)
        updating = self.k % hyper.T_updt == 0
        tallies = {}
        if self.layers and (updating or any(layer.linear is not False for layer in self.layers.values())):
            tallies = self._tallies(team)
        active = [layer for layer in self.layers.values() if layer.has_gradient]
        columns = self._columns(active, tallies) if updating else {}
        by_columns = self._gradient_columns(active, tallies, team)
        if not self._look(updating, columns, by_columns, team):
            self._skipped += 1
            self._say_skipped()
            return False
        for name, pair in (*columns.items(), *by_columns.items()):
            self.layers[name].check_kind(self.k, pair)
        if updating and not self._scale_known and self.fisher == "empirical":
            self._check_scale(active, tallies, team)
        if updating:
            self._update(active, columns, tallies, hyper, team)
        for group, scheduled in zip(self.param_groups, self._group_schedules, strict=True):
            if scheduled:
                group.update({name: schedule(self.epoch) for name, schedule in scheduled.items()})
                _check_group(group)
        self._apply(active, by_columns, hyper)
        return True

    def _tallies(self, team: Processes) -> dict[str, Tally]:
        """What all processes have of each layer.

        Raises:
            InputError: the processes' gradients are not the same.
        """
        layers = list(self.layers.values())
        counts = [
            (
                layer.has_gradient,
                sum(part.batch for part in layer.parts),
                sum(part.columns.A.shape[1] for part in layer.parts),
                any(torch.float64 in (X.dtype for X in part.columns) for part in layer.parts),
            )
            for layer in layers
        ]
        if team.size > 1:
            table = torch.tensor(counts, dtype=torch.int64, device=layers[0].weight.device)
            everyone = team.each(table).tolist()
        else:
            everyone = [counts]
        tallies = {}
        for layer, rows in zip(layers, zip(*everyone, strict=True), strict=True):
            has, batches, widths, double = zip(*rows, strict=True)
            if len(set(map(bool, has))) > 1:
                raise InputError(
                    f"layer {layer.name!r}, step {self.k}: a gradient on some of the processes only; wrap the "
                    "model in DistributedDataParallel, or pass data_parallel=False"
                )
            tallies[layer.name] = Tally(sum(batches), tuple(widths), any(double))
        if team.size > 1 and not self._agreed:
            self._check_agreement(team, layers)
        return tallies

    def _check_agreement(self, team: Processes, layers: Sequence[Layer]) -> None:
        """Once: whether somebody averages the gradients."""
        norms = [torch.linalg.vector_norm(g.double()) for layer in layers if (g := layer.weight.grad) is not None]
        if not norms:
            return
        totals = team.each(torch.stack(norms).sum())
        if not totals.isfinite().all():
            return
        if (totals.max() - totals.min()).item() > 1e-4 * totals.max().item():
            raise InputError(
                f"step {self.k}: the processes' gradients differ; wrap the model in DistributedDataParallel, or "
                "pass data_parallel=False if each process trains its own"
            )
        self._agreed = True

    def _check_scale(self, active: Sequence[Layer], tallies: Mapping[str, Tally], team: Processes) -> None:
        """Once: whether .grad has the scale of the columns, where no `loss_scale` says that it has not."""
        probed = [layer for layer in active if tallies[layer.name].n]
        if callable(self.loss_scale) or self.loss_scale != 1.0 or not probed:
            return
        home = probed[0].weight.device
        pairs = [[v.to(home, torch.float64) for v in layer.scale_probe(tallies[layer.name])] for layer in probed]
        have, want = (torch.cat(part) for part in zip(*pairs, strict=True))
        half = any(part.dtype in (torch.float16, torch.bfloat16) for layer in probed for part in layer.parts)
        scale = lost_scale(have, team.sum(want), half)
        if scale is not None:
            raise InputError(
                f"step {self.k}: .grad is {scale:g} times smaller than G A^T of the columns, in all layers: with "
                "a GradScaler pass loss_scale=scaler.get_scale (if .grad is meant to be, loss_scale=lambda: 1.0)"
            )
        self._scale_known = True

    def _say_skipped(self) -> None:
        """To the log, at the 1st, 2nd, 4th, 8th, ... time."""
        if self._skipped & (self._skipped - 1):
            return
        so_far = f" ({self._skipped} so far)" if self._skipped > 1 else ""
        logger.warning("step %d: NaN or Inf in the gradients or columns, the step is skipped%s", self.k, so_far)

    def _columns(self, active: Sequence[Layer], tallies: Mapping[str, Tally]) -> dict[str, Columns]:
        """This process's share of what the factors take in this step, by layer."""
        columns = {}
        for layer in active:
            tally = tallies[layer.name]
            if tally.n:
                columns[layer.name] = layer.factor_columns(tally, sampled=self.fisher == "sampled")
            elif self.fisher == "sampled":
                raise InputError(
                    f"layer {layer.name!r}, step {self.k}: no sampled labels; call sample_fisher(output) between "
                    "zero_grad() and step()"
                )
            else:
                self._say(
                    f"columns {layer.name}",
                    f"layer {layer.name!r}, step {self.k}: a gradient but no columns (was the layer used other "
                    "than through its own forward?); its factors are not updated",
                )
        return columns

    def _gradient_columns(
        self, active: Sequence[Layer], tallies: Mapping[str, Tally], team: Processes
    ) -> dict[str, Columns]:
        """All processes' columns of the gradients that Algorithm 8 is to precondition."""
        by_columns = {}
        for layer in active:
            if layer.linear is False or not (tally := tallies[layer.name]).n:
                continue
            if layer.linear is None:
                layer.linear = layer.name in _names(self.linear_application) or tally.n < min(layer.dimensions)
            if layer.linear:
                A, G = layer.gradient_columns(tally)
                by_columns[layer.name] = Columns(team.gather(A, tally.widths), team.gather(G, tally.widths))
                if layer.keeps_factors and not layer.is_held:
                    self._say(
                        f"formed {layer.name}",
                        f"layer {layer.name!r}, step {self.k}: the FactoredLinear's gradient was formed before "
                        "the step (its factors are no smaller, or something read .grad)",
                        logging.INFO,
                    )
        return by_columns

    def _look(
        self, updating: bool, columns: Mapping[str, Columns], by_columns: dict[str, Columns], team: Processes
    ) -> bool:
        """Whether all is finite; takes out of `by_columns` the layers where Algorithm 8 cannot apply.

        One wait for the device in all. The norm of the columns overflows where their factor would. All processes
        come to the same answer.
        """
        finite: list[Tensor] = []
        looking = updating or self.skip_nonfinite
        if looking:
            for p in (p for group in self.param_groups for p in group["params"]):
                if (g := formed(p)) is not None and g.numel():
                    g = g.coalesce().values() if g.is_sparse else g
                    finite.append(torch.linalg.vector_norm(g, float("inf")).isfinite())
                for share in held(p):
                    parts = (share.grad,) if share.x is None else (share.grad, share.x)
                    finite += [torch.linalg.vector_norm(X, float("inf")).isfinite() for X in parts if X.numel()]
            for pair in columns.values():
                finite += [(torch.linalg.vector_norm(X) ** 2).isfinite() for X in pair]
        differs = []
        for name, pair in by_columns.items():
            layer = self.layers[name]
            dtype = layer.parts[0].dtype if layer.parts else torch.float32
            unit = rounding(layer.module, dtype, layer.weight.device.type, self._rounding)
            differs.append(layer.differs_from_columns(pair, unit))
        if not looking and not differs:
            return True
        unfit, self._unfit = self._unfit, {}
        home = next(iter(self.layers.values())).weight.device if self.layers else None
        bad = [~torch.stack([flag.to(home or flag.device) for flag in finite]).all()] if finite else []
        bad = bad or [torch.zeros((), dtype=torch.bool, device=home)]
        flags = (*bad, *(last >= 0 for last in unfit.values()), *differs)
        skip, *values = team.any(torch.stack([flag.to(bad[0].device) for flag in flags]))
        lost, values = values[: len(unfit)], values[len(unfit) :]
        for name, last in (item for item, was in zip(unfit.items(), lost, strict=True) if was):
            logger.warning(
                "layer %r, step %d: the preconditioned step left the range of its precision, and was left out",
                name,
                int(last),
            )
        if skip:
            return False
        for name, differ in zip(list(by_columns), values, strict=True):
            if differ:
                del by_columns[name]
                self._say(
                    f"differs {name}",
                    f"layer {name!r}, step {self.k}: .grad is not G A^T of the columns (it was clipped or changed "
                    "otherwise, or has parts from elsewhere); such steps are taken by Algorithm 1, not 8",
                )
        return True

    def _update(
        self,
        active: Sequence[Layer],
        columns: dict[str, Columns],
        tallies: Mapping[str, Tally],
        hyper: HyperParameters,
        team: Processes,
    ) -> None:
        """Lines 5, 9 and 12-13 of Algorithm 1, or what Algorithms 4, 5 and 7 put in their place."""
        work: list[tuple[Factor, Tensor, Sequence[int]]] = []
        for layer in active:
            if layer.name not in columns:
                continue
            tally = tallies[layer.name]
            for factor in layer.make_factors(tally.n, hyper, accumulate=self.accumulate, seed=self.seed):
                self._say_fallback(factor, hyper)
            layer.parts.clear()  # those of convolutions are large
            pair = columns.pop(layer.name)
            if team.size == 1:
                layer.update(self.k, pair, hyper)
            else:
                work += [(layer.factors[side], X, tally.widths) for side, X in zip("AG", pair, strict=True)]
        if work:
            update_together(team, self.k, work, hyper)

    def _say_fallback(self, factor: Factor, hyper: HyperParameters) -> None:
        info = factor.info
        if factor.fell_back:
            self._say(
                f"rank {info.layer} {info.side}",
                f"layer {info.layer!r}, factor {info.side}: r + n >= d ({hyper.rank} + {info.n} >= {info.d}), "
                f"{FALLBACK} in place of Brand's update",
            )

    def _precondition(self, layer: Layer, columns: Columns | None, hyper: HyperParameters) -> Step:
        """S (d_G, d_A), by Algorithm 8 where there are columns, else by Algorithm 1 l.15-18."""
        inverses = layer.inverses(hyper.phi_lambda, self.continuation)
        if inverses is None:
            why = "no estimate yet" if not layer.factors else "no estimate yet, or one that is zero"
            self._say(f"zero {layer.name}", f"layer {layer.name!r}, step {self.k}: {why}; plain gradient")
            return layer.gradient().clone()
        G, A = inverses
        if columns is not None:
            return Product(*precondition_linear(columns.G, columns.A, G, A))
        # The dtypes differ where only the layer's input or gradient is float64.
        J = layer.gradient().to(layer.factors["G"].dtype)
        return cast(Tensor, precondition(J, G, A))

    def _fitting(self, layer: Layer, S: Step) -> tuple[Step, Tensor]:
        """S and its norm, both zero if S is not finite; `_look` reports it, so that nothing waits here."""
        norm = S.norm() if isinstance(S, Product) else torch.linalg.vector_norm(S, dtype=torch.float64)
        unfit = ~(norm <= torch.finfo(S.P.dtype if isinstance(S, Product) else S.dtype).max)
        before = self._unfit.get(layer.name, torch.full((), -1, device=norm.device))
        self._unfit[layer.name] = before.masked_fill(unfit, self.k)
        return _zeroed(S, unfit), norm.masked_fill(unfit, 0.0)

    def _apply(self, active: Sequence[Layer], by_columns: Mapping[str, Columns], hyper: HyperParameters) -> None:
        """Algorithm 1 l.15-19 with clip, weight decay and momentum."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        steps: Iterable[tuple[Layer, Step, Tensor]] = (
            (layer, *self._fitting(layer, self._precondition(layer, by_columns.get(layer.name), hyper)))
            for layer in active
        )
        if self.clip_by == "kl":
            steps = self._clipped_by_kl(list(steps), by_columns, groups)
        for layer, S, norm in steps:
            clip = groups[layer.weight]["clip"]
            if self.clip_by == "layer" and clip is not None:
                S = _scaled(S, _clip_factor(S, norm, clip))
            for p, update in layer.split(S).items():
                self._descend(p, update, groups.pop(p))
        for p, group in groups.items():
            if p.grad is not None:
                self._descend(p, p.grad, group)

    def _clipped_by_kl(
        self,
        steps: list[tuple[Layer, Step, Tensor]],
        by_columns: Mapping[str, Columns],
        groups: Mapping[Tensor, dict[str, Any]],
    ) -> Iterator[tuple[Layer, Step, Tensor]]:
        """All steps by one factor, that keeps lr^2 sum_l <S_l, g_l>, about twice the KL divergence, at `clip`."""
        clip = self.param_groups[0]["clip"]
        if clip is None or not steps:
            yield from steps
            return
        terms = []
        for layer, S, _ in steps:
            if isinstance(S, Product):
                A, G = by_columns[layer.name]
                inner = S.inner(Product(G, A))
            else:
                inner = torch.sum(S * layer.gradient(), dtype=torch.float64)
            terms.append(groups[layer.weight]["lr"] ** 2 * inner)
        total = torch.stack([term.to(terms[0].device) for term in terms]).sum().abs()
        factor = torch.clamp(torch.sqrt(clip / total), max=1.0)
        for layer, S, norm in steps:
            yield layer, _scaled(S, factor), norm * factor

    def _descend(self, p: nn.Parameter, update: Step, group: Mapping[str, Any]) -> None:
        """SGD with `update` in the gradient's place."""
        if isinstance(update, Product):
            if update.fits(p):
                self._descend_product(p, update, group)
                return
            update = update.formed().reshape(p.shape)
        step = update.to(p.dtype)
        if group["weight_decay"]:
            step = step + group["weight_decay"] * p
        if group["momentum"]:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = step.clone()
            else:
                state["momentum_buffer"].mul_(group["momentum"]).add_(step)
            step = state["momentum_buffer"]
        p.add_(step, alpha=-group["lr"])

    def _descend_product(self, p: nn.Parameter, update: Product, group: Mapping[str, Any]) -> None:
        """The same for a step that is not formed."""
        lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
        if not momentum:
            update.add_to(p, beta=1 - lr * decay, alpha=-lr)
            return
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = state["momentum_buffer"]
        update.add_to(buffer, beta=momentum, alpha=1.0)
        if decay:
            buffer.add_(p, alpha=decay)
        p.add_(buffer, alpha=-lr)

    # --------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """As for any optimizer, and under "kfac" the factors and processes by layer name.

        `torch.load(..., weights_only=True)` reads it. Take it between two steps: columns that wait for a step, and
        schedules, which are code, are not in it.
        """
        state = super().state_dict()
        state["kfac"] = {
            "version": 1,
            "k": self.k,
            "epoch": self._epoch,
            "layers": {name: layer.state_dict() for name, layer in self.layers.items()},
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores an optimizer made with the same arguments on a model with the same layer names.

        Raises:
            InputError: the state has no K-FAC part, or other layers, processes or sizes.
        """
        state = dict(state_dict)
        kfac = state.pop("kfac", None)
        if kfac is None:
            raise InputError("the state is not of a KFAC optimizer: it has no 'kfac' entry")
        if set(kfac["layers"]) != set(self.layers):
            odd = sorted(set(kfac["layers"]) ^ set(self.layers))
            raise InputError(
                f"the state has other layers: {', '.join(map(repr, odd))} in one and not in the other"
            )
        # The epoch may be unknown as yet: a factor takes the values of its own at its next update.
        hyper = self.schedules.at(self._epoch_of(kfac["k"], kfac["epoch"]))
        saved = {name: kfac["layers"][name] for name in self.layers}
        restored = {
            name: layer.restored(saved[name], hyper, accumulate=self.accumulate, seed=self.seed)
            for name, layer in self.layers.items()
        }
        state["state"] = map_tensors(state["state"], torch.clone)  # momentum, too, is updated in place
        super().load_state_dict(state)  # the last that may refuse it
        self.k, self._epoch = kfac["k"], kfac["epoch"]
        self._discard()
        for name, layer in self.layers.items():
            layer.restore(saved[name], restored[name])
        self._switch_hooks()

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, together with the model: everything but the hooks."""
        own = without_hooks(self, ("layers", "_handle", "_open"))
        held = {name: (layer.factors, layer.linear) for name, layer in self.layers.items()}
        return {**own, "_held": held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = state.pop("_held", None)
        super().__setstate__(state)
        if held is None:  # from torch's load_state_dict
            return
        self.layers, self._handle, self._open = {}, None, []
        self._follow()
        for name, (factors, linear) in held.items():
            self.layers[name].factors, self.layers[name].linear = factors, linear
        self._switch_hooks()


def _why_plain(
    module: nn.Module, policy: LayerPolicy, mine: set[Tensor], owners: Mapping[Tensor, int]
) -> tuple[str, int] | None:
    """Why a layer is left to SGD, and how loud to say so; None if it is preconditioned."""
    weight = module._parameters.get("weight")
    if reason := _unfollowable(module):
        return reason, logging.WARNING if isinstance(module, nn.Conv2d) else logging.INFO
    if policy == SGD:
        return "is left to SGD by the policy", logging.INFO
    if weight is None:
        return "computes its weight from other parameters", logging.WARNING
    if weight not in mine:
        return "has a weight that is not optimized", logging.INFO
    if owners[weight] > 1:
        return "shares its weight with another layer", logging.WARNING
    return None


def _remove(handles: Sequence[Any], opened: Sequence[ColumnHooks]) -> None:
    for handle in handles:
        handle.remove()
    for hooks in opened:
        hooks.close()


def _zeroed(S: Step, where: Tensor) -> Step:
    """0 if a 0-d boolean is true; a formed S is written to."""
    if isinstance(S, Product):
        return Product(S.P.masked_fill(where, 0.0), S.Q.masked_fill(where, 0.0))
    return S.masked_fill_(where, 0.0)


def _clip_factor(S: Step, norm: Tensor, clip: float) -> Tensor:
    """min(1, clip / rms(S)), a 0-d tensor. The norm was summed in float64: squares of a long step may overflow."""
    return torch.clamp(clip * max(S.numel(), 1) ** 0.5 / norm, max=1.0)


def _scaled(S: Step, factor: Tensor) -> Step:
    """S times a 0-d tensor; a formed S is written to."""
    return S.scaled(factor) if isinstance(S, Product) else S.mul_(factor.to(S))


def _names(linear_application: bool | Sequence[str]) -> tuple[str, ...]:
    if isinstance(linear_application, bool):
        return ()
    return (linear_application,) if isinstance(linear_application, str) else tuple(linear_application)


def _check_choice(what: str, value: str, among: Iterable[str]) -> None:
    if value not in among:
        raise InputError(f"{what} {value!r} is not one of {', '.join(among)}")


def _check_group(group: Mapping[str, Any]) -> None:
    for name in ("lr", "momentum", "weight_decay"):
        _check_setting(name, group[name])
    if group["clip"] is not None and not (is_number(group["clip"]) and group["clip"] > 0):
        raise InputError(f"clip must be positive, or None for no clipping, got {group['clip']!r}")


def _check_setting(name: str, value: Any) -> None:
    if not is_number(value):
        raise InputError(f"{name} must be a number, got {value!r}")
    if not value >= 0:
        raise InputError(f"{name} must not be negative, got {value}")
