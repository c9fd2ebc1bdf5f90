"""The K-FAC family as one torch optimizer: Algorithms 1, 4, 5 and 7, N- and W-KFAC, and Algorithm 8 as a switch.

    optimizer = KFAC(model, "B-KFAC")
    for x, y in loader:
        optimizer.zero_grad()
        loss_function(model(x), y).backward()
        optimizer.step()

Step k, in this order: the EA factors and the processes take the columns of this step, once in T_updt steps; then
each layer's step is `S = Gamma^-1 Mat(g) A^-1` (Algorithm 1 l.15-18), clipped; then weight decay, momentum and the
learning rate act as in SGD. The processes are those of `kfacerr.processes`, the error study's own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import choice, instance, is_number, switch, whole
from ..damping import Damping
from ..exceptions import InputError
from ..inverse import CONTINUATIONS
from ._kfac_layer import KFACLayer
from ._kfac_step import KFACStep
from ._likelihoods import LIKELIHOODS
from ._scaling import read_scale
from .columns import is_linear
from .distributed import Team
from .follower import Capture, shared_parameters, unfollowable
from .layer_optimizer import LayerOptimizer, unwrapped
from .linear import FactoredLinear
from .policy import PRESETS, SGD, Given, Hyper, LayerPolicy, Scheduled, Schedules, check_policy

__all__ = ["KFAC"]

_SCHEDULED = ("momentum", "weight_decay", "clip")


class KFAC(LayerOptimizer):
    """K-FAC, R-KFAC, B-KFAC, B-R-KFAC and B-KFAC-C (Puiu, "Brand New K-FACs"), with a process per K-factor.

    Linear layers and convolutions (1-d, 2-d, groups = 1) are preconditioned. Everything else that is trained,
    among it batch norm, embeddings, grouped convolutions, and layers whose weight is shared or computed, gets
    plain SGD with the same learning rate, momentum and weight decay; the log says once what and why. So does a
    layer, step by step, whose factor is zero or has no estimate yet: its step is the plain gradient.

    Where one step's gradients or columns have NaN or Inf, the step is skipped: parameters, factors, momentum and
    `k` stay as they are. Factors are float32 (float64 for float64 models) with TF32 and autocast off, whatever the
    model's precision.

    Several processes: with torch.distributed initialised, the model wrapped in DistributedDataParallel, and a loss
    that is a mean over each process's own batch, all keep one set of factors and take the step of one process with
    all their batches; see `kfacerr.torch.distributed`. Every process makes an optimizer with the same arguments,
    and calls the same steps.

    Where a layer has fewer columns than min(d_A, d_G), and it takes fewer operations, its step is made from them
    and not from .grad (Algorithm 8). Its `nn.Linear` becomes a `FactoredLinear` for it, in place, the same layer
    but for the backward: .grad is there as the factors of G A^T, and is formed when something reads it.
    What needs the very class nn.Linear (dynamic quantisation, a pickle for where kfacerr is not) takes a new model
    with the state_dict. A step where .grad is no multiple of that, because it was changed otherwise than by its
    norm's clip, or has parts from elsewhere (a penalty), is taken by Algorithm 1, and the log says so once.

    Scaling: batch means as in §2, convolutions as in Grosse & Martens (2016). The loss must be a mean over the
    batch. Damping (§6): lam = phi_lambda * lambda_max of the factor's own representation.

    Args:
        model: the network.
        algorithm: a preset by the paper's name: "K-FAC", "R-KFAC", "SRE-KFAC", "B-KFAC", "B-R-KFAC", "B-KFAC-C".
            The B- presets use theirs on the first fully connected layer and R-KFAC on all others (§3.5); "N-KFAC"
            and "W-KFAC", which the paper did not have, are on all. A factor too small for its process gets R-KFAC
            in its place: one with r + n >= d in place of B-, one with 2 s >= d in place of N-KFAC, s being 2 r.
        params: parameters or groups, as for any optimizer; the model's by default. Groups may have their own lr,
            momentum, weight_decay and clip (of a layer: its weight's).
        lr: learning rate, alpha.
        policy: by layer name what differs from the preset: a name of `kfacerr.algorithms` with settings if wanted
            ("R-KFAC T_inv=10 rank=50"), "SGD", a function `FactorInfo -> Process` for a process of your own (the
            schedules below do not touch it), or {"A": ..., "G": ...} with one for each factor.
        steps_per_epoch: the epoch of step k is `k // steps_per_epoch`, unless you set `optimizer.epoch`.
        clip: each layer's step is scaled by min(1, clip / rms(S)); None for no clipping.
        clip_by: "layer", or "kl" for one factor min(1, sqrt(clip / sum_l lr^2 <S_l, g_l>)) on all layers.
        weight_decay: decoupled from the preconditioning: added to the update, after the clip.
        momentum: as in SGD, of the clipped and decayed step.
        linear_application: False for Algorithm 1 in all steps.
        fisher: "empirical" or "sampled"; see `sample_fisher`.
        damping: a lam for each factor in place of phi_lambda lambda_max: "mean=0.1", ..., see `kfacerr.damping`.
        loss_scale: see `LayerOptimizer`. If it is left at 1, the first update refuses a .grad that is smaller than
            the columns' by one power of two in all layers, from 2^8 on: a scale that nobody declared.
        skip_nonfinite: look at every step for NaN and Inf, which makes the host wait for the device. Without it,
            only steps that update factors are looked at; GradScaler looks at them all anyway.
        data_parallel: False if the processes of torch.distributed, where it is initialised, train a model each.
        **hyper: of §6 by name: T_updt, T_inv, T_brand, T_rsvd, T_corct (periods in steps; T_brand is T_updt, and
            5 T_updt for B-KFAC and B-KFAC-C, if it is not given), phi_corct, rank, oversampling, n_pwr_it,
            phi_lambda and rho. Each of these, and momentum, weight_decay and clip, may be a function of the epoch.
            Also warm_up (no period is longer than a quarter of the steps taken so far; if it is not given, it is
            done where no period is given), continuation ("trace", "min" of §3.5, or "none"), accumulate (Brand
            updates take the batches that T_brand skips, too) and seed (of the sketches, the corrections' choices
            and the sampled labels). See `kfacerr.torch.policy.DEFAULTS`; the paper's are `**kfacerr.torch.PAPER`.

    Attributes:
        epoch: the epoch that schedules see; may be set.
        layers: the preconditioned layers by name.

    Raises:
        InputError: an unknown preset, layer, process or option, a value out of range, or nothing to train.
    """

    _key = "kfac"
    _plain = "plain SGD"
    _way_out = "leave it to SGD with policy={{{name!r}: 'SGD'}}"

    layers: dict[str, KFACLayer]
    _agreed = False  # whether the processes' gradients were seen to be the same
    _epoch: int | None = None  # as set by the user
    _first_fc: str | None = None
    _samples = 0  # micro-batches of the coming step that labels were drawn for

    def __init__(
        self,
        model: nn.Module,
        algorithm: str = "R-KFAC",
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.03,
        policy: Mapping[str, LayerPolicy] | None = None,
        steps_per_epoch: int | None = None,
        clip: Scheduled | None = 0.07,
        clip_by: str = "layer",
        weight_decay: Scheduled = 0.0,
        momentum: Scheduled = 0.9,
        linear_application: bool = True,
        fisher: str = "empirical",
        damping: str | Damping | None = None,
        loss_scale: float | Callable[[], float] = 1.0,
        skip_nonfinite: bool = True,
        data_parallel: bool = True,
        **hyper: Unpack[Given],
    ) -> None:
        choice(algorithm, "algorithm", PRESETS)
        choice(hyper.get("continuation", "trace"), "continuation", CONTINUATIONS)
        choice(clip_by, "clip_by", ("layer", "kl"))
        choice(fisher, "fisher", ("empirical", "sampled"))
        if steps_per_epoch is not None:
            whole(steps_per_epoch, "steps_per_epoch", 1)
        self.algorithm = algorithm
        self.policy = policy or {}
        self.schedules = Schedules(PRESETS[algorithm], hyper)
        self.steps_per_epoch = steps_per_epoch
        self.clip_by = clip_by
        self.linear_application = switch(linear_application, "linear_application")
        self.fisher = fisher
        self.damping = None if damping is None else Damping.of(damping).of_each_factor()
        self._group_schedules: list[dict[str, Callable[[int], float]]] = []
        self._unfit: dict[str, Tensor] = {}  # the last step whose S was not finite, by layer, on its device
        _check_names(model, self.policy)
        super().__init__(
            model,
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "clip": clip},
            loss_scale=loss_scale,
            skip_nonfinite=skip_nonfinite,
            data_parallel=data_parallel,
            left_out={name for name, choice in self.policy.items() if choice == SGD},
        )

    # ---------------------------------------------------------------------------------------- the epoch

    @property
    def epoch(self) -> int:
        """The epoch of the coming step."""
        return self._epoch_of(self.k, self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = whole(epoch, "the epoch")
        self._switch()

    def _epoch_of(self, k: int, given: int | None) -> int:
        if given is not None:
            return given
        return 0 if self.steps_per_epoch is None else k // self.steps_per_epoch

    @property
    def hyper(self) -> Hyper:
        """The hyper-parameters of the coming step.

        Raises:
            InputError: one is a function of the epoch, and nothing tells the epoch.
        """
        scheduled = self.schedules.vary or any(self._group_schedules)
        if scheduled and self._epoch is None and self.steps_per_epoch is None:
            raise InputError("schedules need the epoch: pass steps_per_epoch, or set optimizer.epoch")
        return self.schedules.at(self.epoch, self.k)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimizer. Layers whose weight comes in are preconditioned from now on."""
        given = {**self.defaults, **param_group}
        scheduled = {name: given[name] for name in _SCHEDULED if callable(given[name])}
        now = {name: schedule(self.epoch) for name, schedule in scheduled.items()}
        super().add_param_group({**param_group, **now})
        self._group_schedules.append(scheduled)

    def _keeps_momentum(self, i: int) -> bool:
        return super()._keeps_momentum(i) or "momentum" in self._group_schedules[i]

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        if group["clip"] is not None and not (is_number(group["clip"]) and group["clip"] > 0):
            raise InputError(f"clip must be positive, or None for no clipping, got {group['clip']!r}")

    # ----------------------------------------------------------------------------------------- following

    def _follow(self) -> None:
        if self._first_fc is None:
            modules = self.model.named_modules()
            shared = shared_parameters(self.model)
            trained = ((name, m) for name, m in modules if is_linear(m) and _is_trained(m))
            self._first_fc = next((name for name, m in trained if not self._why_plain("", m, shared)), None)
        super()._follow()

    def _made_layer(self, name: str, module: nn.Module, shared: set[nn.Parameter]) -> KFACLayer:
        preset = PRESETS[self.algorithm]
        policy = self.policy.get(name, preset.first_fc if name == self._first_fc else preset.others)
        asked = self.linear_application and self.fisher == "empirical"  # of sampled labels G A^T is no gradient
        if asked and type(module) is nn.Linear:
            module.__class__ = FactoredLinear
        elif isinstance(module, FactoredLinear) and self.fisher == "sampled":
            self._say(
                f"sampled {name}",
                f"layer {name!r}: fisher='sampled', where G A^T is not the gradient: Algorithm 1, and the "
                "FactoredLinear's gradient is formed",
            )
        return KFACLayer(name, module, self._mine, shared, policy, asked=asked)

    def _wanted(self) -> set[str]:
        """All layers in T_updt steps; those of Algorithm 8 always."""
        try:
            updating = self.k % self.hyper.T_updt == 0
        except InputError:  # the epoch is not known yet; the step will say so
            updating = True
        return {name for name, layer in self.layers.items() if updating or layer.linear is not False}

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
            likelihood = LIKELIHOODS[choice(likelihood, "likelihood", LIKELIHOODS)]
        if not callable(likelihood):
            raise InputError(f"likelihood must be a name or a function, got {likelihood!r}")
        instance(output, "the output", Tensor)
        if self.k % self.hyper.T_updt:
            return
        layers = [layer for layer in self.layers.values() if layer.is_optimized and layer.weight.requires_grad]
        if not any(layer.has_gradient for layer in layers):
            for layer in layers:  # the gradients that the columns belonged to are gone
                layer.parts.clear()
            self._samples = 0
        team = Team(self.data_parallel)
        own = [] if team.size == 1 else [team.rank]  # each process has samples of its own to draw for
        seeds = np.random.SeedSequence([self.hyper.settings.seed, self.k, self._samples, *own])
        generator = torch.Generator(output.device).manual_seed(int(seeds.generate_state(1)[0]))
        self._samples += 1
        scale = read_scale(self.loss_scale)  # keeps a half-precision backward in range
        self._tell_scale(scale)
        with torch.autocast(output.device.type, enabled=False):
            loss = likelihood(output if output.dtype == torch.float64 else output.float(), generator)
        self._follower.forget()
        torch.autograd.grad(loss * scale, [layer.weight for layer in layers], retain_graph=True, allow_unused=True)
        for name, captures in self._follower.take().items():
            self.layers[name].collect(captures)

    # ---------------------------------------------------------------------------------------------- step

    def _discard(self) -> None:
        super()._discard()
        self._samples = 0

    def _check(self) -> None:
        super()._check()
        _ = self.hyper  # refuses a schedule without an epoch

    def _advance(self, captures: Mapping[str, Sequence[Capture]], team: Team) -> bool:
        if self.fisher == "empirical":  # else those are of the true labels
            for name, passes in captures.items():
                self.layers[name].collect(passes)
        step = KFACStep(self, team)
        if not step.is_fit():
            return False
        for name, pair in (*step.columns.items(), *step.by_columns.items()):
            self.layers[name].check_kind(self.k, pair)
        if step.updating:
            if self.fisher == "empirical" and self._scale.is_open(self.loss_scale):
                self._scale.look((self.layers[name].scale_probe(team.size) for name in step.columns), team, self.k)
            step.update()
        for group, scheduled in zip(self.param_groups, self._group_schedules, strict=True):
            if scheduled:
                group.update({name: schedule(self.epoch) for name, schedule in scheduled.items()})
                self._check_group(group)
        self._descend(step.directions())
        return True

    # --------------------------------------------------------------------------------------------- state

    def _own_state(self) -> dict[str, Any]:
        return {**super()._own_state(), "epoch": self._epoch}

    def _prepared(self, state: Mapping[str, Any]) -> Callable[[], None]:
        if set(state["layers"]) != set(self.layers):
            odd = sorted(set(state["layers"]) ^ set(self.layers))
            raise InputError(
                f"the state has other layers: {', '.join(map(repr, odd))} in one and not in the other"
            )
        if state["epoch"] is not None:
            whole(state["epoch"], "the epoch")
        # The epoch may be unknown as yet: a factor takes the values of its own at its next update.
        settings = self.schedules.at(self._epoch_of(state["k"], state["epoch"]), state["k"]).settings
        layers = [self.layers[name].restored(saved, settings) for name, saved in state["layers"].items()]

        def take() -> None:
            self.k, self._epoch = state["k"], state["epoch"]
            for layer in layers:
                layer()

        return take


def _check_names(model: nn.Module, policy: Any) -> None:
    """Refuses a policy for layers that the model has not."""
    if not isinstance(policy, Mapping):
        raise InputError(f"policy must map layer names to choices, got {policy!r}")
    modules = dict(unwrapped(model).named_modules())
    for name in policy:
        if name not in modules:
            raise InputError(f"the model has no layer {name!r}")
    for name, chosen in policy.items():
        check_policy(name, chosen)
        if chosen != SGD and (reason := unfollowable(modules[name])):
            raise InputError(f"layer {name!r} {reason}: it cannot be preconditioned")


def _is_trained(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.requires_grad
