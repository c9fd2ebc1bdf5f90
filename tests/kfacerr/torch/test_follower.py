"""The follower matches forwards and backwards, whoever calls them, and refuses what would give wrong columns."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfacerr.exceptions import InputError
from kfacerr.torch import ColumnHooks
from kfacerr.torch.follower import Follower, followable_layers
from tests.kfacerr.torch.test_columns import assert_reproduces, gradient


def _net(**kwargs) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(48, 8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(8, 4, bias=False),
    )
    return net.to(**kwargs)


NAMES = ("0", "3", "6")


def _batch(dtype: torch.dtype = torch.float64, b: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(b, 2, 4, 4, dtype=dtype), torch.randint(4, (b,))


def _loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


# ------------------------------------------------------------------------------- models as they are


def test_several_layers_with_inplace_relu_and_dropout_behind_them():
    net = _net(dtype=torch.float64)
    with ColumnHooks(net, NAMES) as hooks:
        for _ in range(3):
            net.zero_grad()
            _loss(net, *_batch()).backward()
            columns = hooks.pop()
            assert tuple(columns) == NAMES
            for name in NAMES:
                assert_reproduces(net.get_submodule(name), columns[name])


def test_hooks_leave_the_gradient_bit_for_bit_as_it_was():
    plain, hooked = _net(), _net()
    x, y = _batch(torch.float32)
    torch.manual_seed(3)
    _loss(plain, x, y).backward()
    with ColumnHooks(hooked, NAMES) as hooks:
        torch.manual_seed(3)
        _loss(hooked, x, y).backward()
        hooks.pop()
    for p, q in zip(plain.parameters(), hooked.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_columns_are_detached_and_at_least_float32(dtype, expected):
    net = _net(dtype=dtype)
    with ColumnHooks(net, NAMES) as hooks:
        _loss(net, *_batch(dtype)).backward()
        for columns in hooks.pop().values():
            for array in columns:
                assert array.dtype == expected
                assert not array.requires_grad
                assert array.is_contiguous()


def test_bfloat16_autocast_gives_float32_columns_close_to_the_gradient():
    net = _net()
    x, y = _batch(torch.float32)
    with ColumnHooks(net, NAMES) as hooks:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = _loss(net, x, y)
        loss.backward()
        for name, columns in hooks.pop().items():
            assert columns.A.dtype == columns.G.dtype == torch.float32
            assert_reproduces(net.get_submodule(name), columns, rtol=2e-2)


def test_loss_scale_is_taken_out_of_G():
    net = _net(dtype=torch.float64).eval()
    with ColumnHooks(net, ["3"]) as hooks:
        _loss(net, *_batch()).backward()
        A, G = hooks.pop()["3"]
        (1024 * _loss(net, *_batch())).backward()
        A2, G2 = hooks.pop(loss_scale=1024)["3"]
    torch.testing.assert_close(A, A2)
    torch.testing.assert_close(G, G2)


def test_layer_called_with_a_keyword_argument():
    layer = nn.Linear(2, 2)
    with ColumnHooks(layer, [""]) as hooks:
        layer(input=torch.ones(3, 2)).sum().backward()
        assert_reproduces(layer, hooks.pop()[""], rtol=1e-6)


def test_frozen_layer_is_followed_as_long_as_its_output_needs_a_gradient():
    net = _net(dtype=torch.float64)
    net[3].requires_grad_(False)
    with ColumnHooks(net, ["3"]) as hooks:
        _loss(net, *_batch()).backward()
        assert hooks.pop()["3"].G.shape == (8, 5)


# ------------------------------------------------------------------------ evaluation, switch, copies


def test_evaluation_without_gradient_disturbs_nothing():
    net = _net(dtype=torch.float64)
    x, y = _batch()
    with ColumnHooks(net, NAMES) as hooks:
        loss = _loss(net, x, y)
        with torch.no_grad():
            net(torch.zeros_like(x))
        loss.backward()
        with torch.no_grad():
            net(torch.zeros_like(x))
        for name, columns in hooks.pop().items():
            assert_reproduces(net.get_submodule(name), columns)


def test_forward_without_backward_is_forgotten():
    net = _net(dtype=torch.float64)
    x, y = _batch()
    with ColumnHooks(net, NAMES) as hooks:
        net(2 * x)
        _loss(net, x, y).backward()
        for name, columns in hooks.pop().items():
            assert_reproduces(net.get_submodule(name), columns)


def test_nothing_is_captured_while_disabled():
    net = _net(dtype=torch.float64)
    with ColumnHooks(net, NAMES) as hooks:
        hooks.enabled = False
        _loss(net, *_batch()).backward()
        with pytest.raises(InputError, match=r"'0' was not reached.*disabled"):
            hooks.pop()
        hooks.enabled = True
        _loss(net, *_batch()).backward()
        assert set(hooks.pop()) == set(NAMES)


def test_close_removes_every_hook():
    net = _net(dtype=torch.float64)
    hooks = ColumnHooks(net, NAMES)
    loss = _loss(net, *_batch())
    hooks.close()
    hooks.close()
    loss.backward()  # its tensor hooks are still in the graph and must be inert
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(InputError, match="closed"):
        hooks.pop()


@pytest.mark.parametrize("when", ["before", "after forward", "after backward"])
def test_deepcopy_of_a_hooked_model_is_independent(when):
    net = _net(dtype=torch.float64)
    x, y = _batch()
    with ColumnHooks(net, NAMES) as hooks:
        clone = copy.deepcopy(net)
        loss = _loss(net, x, y)
        if when == "after forward":
            clone = copy.deepcopy(net)
        loss.backward()
        if when == "after backward":
            clone = copy.deepcopy(net)
        _loss(clone, 2 * x, y).backward()
        for name, columns in hooks.pop().items():
            assert_reproduces(net.get_submodule(name), columns)


def test_hooked_model_can_be_pickled():
    net = _net()
    with ColumnHooks(net, NAMES):
        buffer = io.BytesIO()
        torch.save(net, buffer)
    buffer.seek(0)
    clone = torch.load(buffer, weights_only=False)
    assert clone(_batch(torch.float32)[0]).shape == (5, 4)


def test_second_backward_through_a_retained_graph_after_pop_is_ignored():
    """Labels drawn from the model first, the true gradient second: the Fisher's columns stay."""
    net = _net(dtype=torch.float64)
    x, y = _batch()
    with ColumnHooks(net, NAMES) as hooks:
        out = net(x)
        F.cross_entropy(out, y).backward(retain_graph=True)
        hooks.pop()
        F.cross_entropy(out, y).backward()
        _loss(net, x, y).backward()
        assert set(hooks.pop()) == set(NAMES)


# ------------------------------------------------------------------------------------------- refusals


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(self.fc(x))


def test_layer_used_twice_in_one_backward_is_refused():
    net = _Twice()
    with ColumnHooks(net, ["fc"]) as hooks:
        for _ in range(2):  # in every step, not in the first alone
            with pytest.raises(InputError, match="'fc' is used twice in one backward"):
                net(torch.ones(2, 3)).sum().backward()
        with pytest.raises(InputError, match="'fc' is used twice in one backward"):
            (net.fc(torch.ones(2, 3)) + net.fc(torch.zeros(2, 3))).sum().backward()
        with torch.no_grad():
            net(torch.ones(2, 3))
        hooks.enabled = False
        net(torch.ones(2, 3)).sum().backward()


def test_layer_that_is_never_reached_is_named():
    net = _Twice()
    with ColumnHooks(net, ["spare"]) as hooks:
        net(torch.ones(2, 3)).sum().backward()
        with pytest.raises(InputError, match="'spare' was not reached by a forward"):
            hooks.pop()


def test_pop_between_forward_and_backward_is_refused():
    net = _net()
    with ColumnHooks(net, ["3"]) as hooks:
        net(_batch(torch.float32)[0])
        with pytest.raises(InputError, match="'3' was reached by a forward but by no backward"):
            hooks.pop()


def test_gradient_accumulation_pops_after_each_micro_batch():
    net = _net(dtype=torch.float64).eval()
    x, y = _batch(b=6)
    with ColumnHooks(net, ["3"]) as hooks:
        total = torch.zeros(8, 49, dtype=torch.float64)
        for part in (slice(0, 3), slice(3, 6)):
            (_loss(net, x[part], y[part]) / 2).backward()
            A, G = hooks.pop(loss_scale=0.5)["3"]
            total += G @ A.T / 2
        torch.testing.assert_close(total, gradient(net[3]))
        _loss(net, x, y).backward()
        with pytest.raises(InputError, match=r"'3'.*call pop\(\) after each backward"):
            _loss(net, x, y).backward()
        assert set(hooks.pop()) == {"3"}  # the refusal lost nothing


def test_two_backwards_without_pop_are_refused():
    net = _net(dtype=torch.float64)
    x, y = _batch()
    with ColumnHooks(net, ["3"]):
        loss = _loss(net, x, y)
        loss.backward(retain_graph=True)
        with pytest.raises(InputError, match=r"call pop\(\) after each backward"):
            loss.backward()


def test_a_backward_without_the_weights_gradient_leaves_no_columns():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3, requires_grad=True)
    follower = _follower(net, "0", "2")
    torch.autograd.grad(net(x).sum(), x)
    assert not follower.take()
    net(x).square().sum().backward(inputs=[net[2].weight], retain_graph=True)
    assert list(follower.take()) == ["2"]
    torch.autograd.grad(net(x).sum(), [net[0].weight, net[2].weight])
    assert set(follower.take()) == {"0", "2"}


def test_the_output_projection_of_attention_cannot_be_followed():
    net = nn.MultiheadAttention(4, 2)
    assert followable_layers(net) == []
    with pytest.raises(InputError, match="'out_proj' is part of a MultiheadAttention"):
        ColumnHooks(net, ["out_proj"])


def test_input_overwritten_before_pop_is_refused():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)  # autograd itself does not need the input then
    x = torch.ones(4, 3)
    with ColumnHooks(layer, [""]) as hooks:
        loss = layer(x).sum()
        x.zero_()
        loss.backward()
        with pytest.raises(InputError, match="overwritten in place"):
            hooks.pop()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["fc9"], "no layer 'fc9'; the layers that can be followed: conv, fc"),
        (["norm"], "'norm' is a BatchNorm2d, not a Linear, Conv1d or Conv2d; .*: conv, fc"),
        (["grouped"], r"'grouped' is a grouped convolution \(groups=2\).*: conv, fc"),
        (["tied"], "'tied' shares its weight with another layer, so that G A.T is not the weight's gradient"),
        (["fc", "fc"], "'fc' is named twice"),
        ([], "no layer is named; .*: conv, fc"),
    ],
)
def test_bad_layer_names_are_refused_and_the_candidates_listed(layers, message):
    net = nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 2, 3),
            "norm": nn.BatchNorm2d(2),
            "grouped": nn.Conv2d(2, 2, 3, groups=2),
            "fc": nn.Linear(2, 2),
            "tied": nn.Linear(3, 2),
            "embedding": nn.Embedding(2, 3),
        }
    )
    net["embedding"].weight = net["tied"].weight
    with pytest.raises(InputError, match=message) as caught:
        ColumnHooks(net, layers)
    assert "\n" not in str(caught.value)
    assert followable_layers(net) == ["conv", "fc"]
    assert not net["fc"]._forward_hooks


# --------------------------------------------------------------------- whoever calls the layers, and when


def _follower(net: nn.Module, *names: str, several: bool = True) -> Follower:
    modules = {name: net.get_submodule(name) for name in names}
    return Follower(modules, several=several, way_out="leave it out")


def _segments(depth: int, reentrant: bool):
    """Forwards of a net that is recomputed in the backward, whole or in nested segments."""

    def run(net: nn.Module, x: Tensor) -> Tensor:
        call = net
        for _ in range(depth):
            call = _checkpointed(call, reentrant)
        return call(x)

    return run


def _checkpointed(call, reentrant: bool):
    return lambda x: checkpoint(call, x, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("depth", [1, 2])
def test_recomputed_forwards_are_followed(reentrant, depth):
    """Checkpointing of either kind: the columns are those of the gradient."""
    net = _net(dtype=torch.float64)
    x, y = _batch()
    x.requires_grad_()
    run = _segments(depth, reentrant)
    with ColumnHooks(net, NAMES) as hooks:
        for _ in range(2):
            net.zero_grad()
            F.cross_entropy(run(net, x), y).backward()
            for name, columns in hooks.pop().items():
                assert_reproduces(net.get_submodule(name), columns)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_layer_in_two_recomputed_segments_of_one_backward_is_used_twice(reentrant):
    """Reentrant segments run backwards of their own inside the user's one."""
    layer = nn.Linear(3, 3)
    segment = _checkpointed(lambda x: torch.tanh(layer(x)), reentrant)
    nested = _checkpointed(segment, reentrant)
    x = torch.ones(2, 3, requires_grad=True)
    follower = _follower(layer, "")
    for call in (segment, nested):
        with pytest.raises(InputError, match="layer '' is used twice in one backward"):
            call(call(x)).sum().backward()
        for outside in (lambda: layer(call(x)), lambda: call(layer(x))):  # noqa: B023
            with pytest.raises(InputError, match="layer '' is used twice in one backward"):
                outside().sum().backward()
        for _ in range(2):
            call(x).sum().backward()
        (passes,) = follower.take().values()
        assert len(passes) == 2 and len({capture.backward for capture in passes}) == 2


def test_backwards_are_micro_batches_whatever_the_order_of_the_forwards():
    net = _net(dtype=torch.float64).eval()
    x, y = _batch(b=6)
    follower = _follower(net, "3")
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    losses = [_loss(net, *part) for part in parts]
    net[3](torch.zeros(1, 48, dtype=torch.float64))  # a part of the model alone, and no backward
    for loss in losses:
        loss.backward()
    (passes,) = follower.take().values()
    total = sum(capture.grad.T @ capture.x for capture in passes)
    torch.testing.assert_close(total, net[3].weight.grad)
    assert [len(capture.x) for capture in passes] == [2, 4]


def test_captures_whose_gradient_was_cleared_are_dropped_by_the_next():
    net = _net(dtype=torch.float64).eval()
    follower = _follower(net, "0", "3")
    loss = _loss(net, *_batch())
    loss.backward(retain_graph=True)
    _loss(net, *_batch(b=2)).backward()
    net[3].zero_grad()
    loss.backward()
    taken = follower.take()
    assert [len(capture.x) for capture in taken["0"]] == [5, 2]
    (capture,) = taken["3"]
    torch.testing.assert_close(capture.grad.T @ capture.x, net[3].weight.grad)


def test_a_forward_without_a_backward_leaves_nothing_in_memory():
    net = _net()
    follower = _follower(net, *NAMES)
    x = torch.randn(5, 2, 4, 4)
    kept = weakref.ref(x)
    out = net(x)
    assert not follower.take()
    del out, x
    gc.collect()
    assert kept() is None


def test_what_was_taken_and_released_is_not_held_by_the_graph():
    layer = nn.Linear(3, 2)
    follower = _follower(layer, "")
    x = torch.randn(4, 3)
    kept = weakref.ref(x)
    out = layer(x.sin())
    out.square().sum().backward()
    ((capture,),) = follower.take().values()
    held = weakref.ref(capture.x.untyped_storage())
    capture.release()
    del capture, x
    gc.collect()
    assert kept() is None and held() is None and out.grad_fn is not None


def test_a_backward_after_one_that_failed_is_another():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("no gradient here")

    net = _net(dtype=torch.float64).eval()
    follower = _follower(net, "3")
    x, y = _batch()
    with pytest.raises(ValueError, match="no gradient here"):
        F.cross_entropy(net[3:](Fails.apply(net[:3](x))), y).backward()
    _loss(net, x, y).backward()
    first, second = follower.take()["3"]
    assert first.backward != second.backward


def test_only_active_layers_are_caught():
    net = _net()
    follower = _follower(net, *NAMES)
    follower.active = {"3"}
    _loss(net, *_batch(torch.float32)).backward()
    assert list(follower.take()) == ["3"]


def test_frozen_layers_may_be_passed_over():
    net = _net()
    net[3].weight.requires_grad_(False)
    modules = {name: net.get_submodule(name) for name in NAMES}
    followers = [Follower(modules, several=True, way_out="", frozen=frozen) for frozen in (True, False)]
    _loss(net, *_batch(torch.float32)).backward()
    assert [set(follower.take()) for follower in followers] == [{"0", "3", "6"}, {"0", "6"}]


def test_under_torch_func_nothing_is_caught():
    net = _net().eval()
    x, y = _batch(torch.float32)
    follower = _follower(net, *NAMES)
    own = {name: p.detach() for name, p in net.named_parameters()}
    torch.func.grad(lambda p: F.cross_entropy(torch.func.functional_call(net, p, (x,)), y))(own)
    assert not follower.take()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_model_is_followed():
    torch._dynamo.reset()
    net = _net(dtype=torch.float64).eval()
    model = torch.compile(net, backend="aot_eager")
    with ColumnHooks(net, NAMES) as hooks:
        for _ in range(2):
            net.zero_grad()
            _loss(model, *_batch()).backward()
            for name, columns in hooks.pop().items():
                assert_reproduces(net.get_submodule(name), columns)
