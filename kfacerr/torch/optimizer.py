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

from ..errors import InputError
from ..inverse import CONTINUATIONS, DampedInverse, precondition, precondition_linear
from ..stream import Columns
from .hooks import ColumnHooks, _Hook, _unfollowable
from .layers import FALLBACK, Layer, factor_columns, gradient_columns, map_tensors
from .likelihoods import LIKELIHOODS
from .policy import PRESETS, SGD, HyperParameters, LayerPolicy, Schedules, check_policy
from .precision import full_precision

__all__ = ["KFAC"]

logger = logging.getLogger(__name__)

_GROUP_DEFAULTS = ("momentum", "weight_decay", "clip")
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

    Scaling: batch means as in §2, convolutions as in Grosse & Martens (2016), see `kfacerr.torch.layers`. The loss
    must be a mean over the batch. Damping (§6): lam = phi_lambda * lambda_max of the factor's own representation.

    Args:
        model: the network, called as `model(...)`.
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
            taken by Algorithm 1, and the log says so once. .grad is formed all the same.
        fisher: "empirical" or "sampled"; see `sample_fisher`.
        loss_scale: what the loss is multiplied with before `backward()`, while .grad is unscaled before `step()`;
            for a GradScaler pass `scaler.get_scale`.
        skip_nonfinite: look at every step for NaN and Inf, which makes the host wait for the device. Without it,
            only steps that update factors are looked at; GradScaler looks at them all anyway.
        seed: of the RSVD's sketches, the corrections' choices and the sampled labels.

    Attributes:
        k: number of steps taken.
        epoch: the epoch that schedules see; may be set.
        layers: the preconditioned layers by name.

    Raises:
        InputError: an unknown preset, layer, process or option, or a value out of range.
    """

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
        if not lr >= 0:
            raise InputError(f"lr must not be negative, got {lr}")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise InputError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise InputError("KFAC does not yet share its factors between processes: use one process")
        self.model = model
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
        self.k = 0
        self.layers: dict[str, Layer] = {}
        self._epoch: int | None = None
        self._group_schedules: list[dict[str, Callable[[int], float]]] = []
        self._samples = 0  # micro-batches of the coming step that labels were drawn for
        self._said: set[str] = set()
        self._handle: Any = None
        self._open: list[ColumnHooks] = []
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "clip": clip})
        self._follow()

    # ---------------------------------------------------------------------------------------- the epoch

    @property
    def epoch(self) -> int:
        if self._epoch is not None:
            return self._epoch
        return 0 if self.steps_per_epoch is None else self.k // self.steps_per_epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = int(epoch)

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
            self._handle = self.model.register_forward_pre_hook(_Hook(_weakly(self._on_forward)), prepend=True)
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
            if self.linear_application is True or name in _names(self.linear_application):
                layer.linear = None
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
        if all(layer.weight.grad is None for layer in self.layers.values()):
            self._discard()  # the gradients they belonged to are gone
        else:
            self._collect()
        self._switch_hooks()

    def _collect(self) -> None:
        for layer in self.layers.values():
            if self.fisher == "empirical":
                layer.collect(self._loss_scale())
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
        super().zero_grad(set_to_none)
        self._discard()

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
        seeds = np.random.SeedSequence([self.seed, self.k, self._samples])
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
            with full_precision(device.type):
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
        updating = self.k % hyper.T_updt == 0
        active = [layer for layer in self.layers.values() if layer.weight.grad is not None]
        columns = self._columns(active) if updating else {}
        by_columns = {}
        for layer in active:
            if layer.linear is not False and layer.parts:
                pair = gradient_columns(layer.parts)
                if layer.linear is None:
                    named = layer.name in _names(self.linear_application)
                    layer.linear = named or pair.A.shape[1] < min(pair.A.shape[0], pair.G.shape[0])
                if layer.linear:
                    by_columns[layer.name] = pair
        if not self._look(updating, columns, by_columns):
            self._say("skip", f"step {self.k}: NaN or Inf in the gradients or columns, the step is skipped")
            return False
        for layer in active:
            if layer.name in columns:
                layer.parts.clear()  # those of convolutions are large
                self._update(layer, columns.pop(layer.name), hyper)
        for group, scheduled in zip(self.param_groups, self._group_schedules, strict=True):
            if scheduled:
                group.update({name: schedule(self.epoch) for name, schedule in scheduled.items()})
                _check_group(group)
        self._apply(active, by_columns, hyper)
        return True

    def _columns(self, active: Sequence[Layer]) -> dict[str, Columns]:
        """What the factors take in this step, by layer. Under data parallelism the ranks' columns meet here."""
        columns = {}
        for layer in active:
            if layer.parts:
                columns[layer.name] = factor_columns(layer.parts, sampled=self.fisher == "sampled")
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

    def _look(self, updating: bool, columns: Mapping[str, Columns], by_columns: dict[str, Columns]) -> bool:
        """Whether all is finite; takes out of `by_columns` the layers where Algorithm 8 cannot apply.

        One wait for the device in all. The norm of the columns overflows where their factor would.
        """
        flags: list[Tensor] = []
        if updating or self.skip_nonfinite:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            dense = [g.coalesce().values() if g.is_sparse else g for g in grads]
            flags += [torch.linalg.vector_norm(g, float("inf")).isfinite() for g in dense if g.numel()]
            for pair in columns.values():
                flags += [(torch.linalg.vector_norm(X) ** 2).isfinite() for X in pair]
        count = len(flags)
        for name, pair in by_columns.items():
            flags.append(self.layers[name].differs_from_columns(pair, self.layers[name].parts[0].dtype))
        if not flags:
            return True
        home = flags[0].device
        values = torch.stack([flag.to(home) for flag in flags]).tolist()
        if not all(values[:count]):
            return False
        for name, differs in zip(list(by_columns), values[count:], strict=True):
            if differs:
                del by_columns[name]
                self._say(
                    f"differs {name}",
                    f"layer {name!r}, step {self.k}: .grad is not G A^T of the columns (it was clipped or changed "
                    "otherwise, or has parts from elsewhere); such steps are taken by Algorithm 1, not 8",
                )
        return True

    def _update(self, layer: Layer, columns: Columns, hyper: HyperParameters) -> None:
        """Lines 5, 9 and 12-13 of Algorithm 1, or what Algorithms 4, 5 and 7 put in their place."""
        for factor in layer.update(self.k, columns, hyper, accumulate=self.accumulate, seed=self.seed):
            if factor.fell_back:
                info = factor.info
                self._say(
                    f"rank {layer.name} {info.side}",
                    f"layer {layer.name!r}, factor {info.side}: r + n >= d ({hyper.rank} + {info.n} >= {info.d}), "
                    f"{FALLBACK} in place of Brand's update",
                )

    def _precondition(self, layer: Layer, columns: Columns | None, hyper: HyperParameters) -> Tensor:
        """S (d_G, d_A), by Algorithm 8 where there are columns, else by Algorithm 1 l.15-18."""
        inverses = layer.inverses(hyper.phi_lambda, self.continuation)
        if inverses is None:
            why = "no estimate yet" if not layer.factors else "no estimate yet, or one that is zero"
            self._say(f"zero {layer.name}", f"layer {layer.name!r}, step {self.k}: {why}; plain gradient")
            return layer.gradient().clone()
        G, A = inverses
        if columns is not None:
            P, Q = precondition_linear(columns.G, columns.A, G, A)
            return P @ Q.T
        J = layer.gradient()
        return cast(Tensor, precondition(_like(J, G), G, A))

    def _apply(self, active: Sequence[Layer], by_columns: Mapping[str, Columns], hyper: HyperParameters) -> None:
        """Algorithm 1 l.15-19 with clip, weight decay and momentum."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        steps: Iterator[tuple[Layer, Tensor]] = (
            (layer, self._precondition(layer, by_columns.get(layer.name), hyper)) for layer in active
        )
        if self.clip_by == "kl":
            steps = self._clipped_by_kl(list(steps), groups)
        for layer, S in steps:
            clip = groups[layer.weight]["clip"]
            if self.clip_by == "layer" and clip is not None:
                S.mul_(_clip_factor(S, clip))
            for p, update in layer.split(S).items():
                self._descend(p, update, groups.pop(p))
        for p, group in groups.items():
            if p.grad is not None:
                self._descend(p, p.grad, group)

    def _clipped_by_kl(
        self, steps: list[tuple[Layer, Tensor]], groups: Mapping[Tensor, dict[str, Any]]
    ) -> Iterator[tuple[Layer, Tensor]]:
        """All steps by one factor, that keeps lr^2 sum_l <S_l, g_l>, about twice the KL divergence, at `clip`."""
        clip = self.param_groups[0]["clip"]
        if clip is not None and steps:
            terms = [
                groups[layer.weight]["lr"] ** 2 * torch.sum(S * layer.gradient(), dtype=torch.float64)
                for layer, S in steps
            ]
            total = torch.stack([term.to(terms[0].device) for term in terms]).sum().abs()
            factor = torch.clamp(torch.sqrt(clip / total), max=1.0)
            for _, S in steps:
                S.mul_(factor.to(S))
        yield from steps

    def _descend(self, p: nn.Parameter, update: Tensor, group: Mapping[str, Any]) -> None:
        """SGD with `update` in the gradient's place."""
        update = update.to(p.dtype)
        if group["weight_decay"]:
            update = update + group["weight_decay"] * p
        if group["momentum"]:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = update.clone()
            else:
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
            update = state["momentum_buffer"]
        p.add_(update, alpha=-group["lr"])

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
        state["state"] = map_tensors(state["state"], torch.clone)  # momentum, too, is updated in place
        super().load_state_dict(state)
        self.k, self._epoch = kfac["k"], kfac["epoch"]
        self._discard()
        hyper = self.hyper
        for name, layer in self.layers.items():
            layer.load_state_dict(kfac["layers"][name], hyper, accumulate=self.accumulate, seed=self.seed)
        self._switch_hooks()

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle, together with the model: everything but the hooks."""
        left = ("layers", "_handle", "_open", "step")  # `step`: a learning rate scheduler's wrapper
        own = {
            name: value
            for name, value in self.__dict__.items()
            if name not in left and not name.startswith(("_optimizer", "_zero_grad"))
        }
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


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """The method while its object lives: a model must not keep its optimizers alive."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        alive = reference()
        if alive is not None:
            alive(*args)

    return call


def _remove(handles: Sequence[Any], opened: Sequence[ColumnHooks]) -> None:
    for handle in handles:
        handle.remove()
    for hooks in opened:
        hooks.close()


def _clip_factor(S: Tensor, clip: float) -> Tensor:
    """min(1, clip / rms(S)), a 0-d tensor. The norm is summed in float64: squares of a long step may overflow."""
    rms = torch.linalg.vector_norm(S, dtype=torch.float64) / max(S.numel(), 1) ** 0.5
    return torch.clamp(clip / rms, max=1.0).to(S.dtype)


def _like(J: Tensor, inverse: DampedInverse) -> Tensor:
    """The gradient in the factors' dtype; they differ where only the layer's input or gradient is float64."""
    return J.to(inverse.lowrank.D.dtype)


def _names(linear_application: bool | Sequence[str]) -> tuple[str, ...]:
    if isinstance(linear_application, bool):
        return ()
    return (linear_application,) if isinstance(linear_application, str) else tuple(linear_application)


def _check_choice(what: str, value: str, among: Iterable[str]) -> None:
    if value not in among:
        raise InputError(f"{what} {value!r} is not one of {', '.join(among)}")


def _check_group(group: Mapping[str, Any]) -> None:
    for name in ("lr", "momentum", "weight_decay"):
        if not group[name] >= 0:
            raise InputError(f"{name} must not be negative, got {group[name]}")
    if group["clip"] is not None and not group["clip"] > 0:
        raise InputError(f"clip must be positive, or None for no clipping, got {group['clip']}")
