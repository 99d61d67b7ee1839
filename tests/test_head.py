"""The head is found by what the forward pass does, not by its name or position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lightning_muter.errors import UnsuitableError
from lightning_muter.model.head import eval_mode, features, find_head


class Net(nn.Module):
    """Backbone, a decoy declared after the head, and a hook for what happens to the logits."""

    def __init__(self, classes: int = 3, after=lambda z: z) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
        self.head = nn.Linear(5, classes)
        self.decoy = nn.Linear(5, classes)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.head(self.backbone(x).tanh()))


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def test_finds_the_layer_that_gives_the_logits_not_the_last_declared(x: Tensor) -> None:
    net = Net()
    head = find_head(net, x)
    assert head.name == "head"
    assert head.linear is net.head


def test_one_logit_may_be_squeezed(x: Tensor) -> None:
    assert find_head(Net(1, lambda z: z.squeeze(-1)), x).name == "head"
    assert find_head(Net(1), x).name == "head"


def test_module_that_is_itself_the_head() -> None:
    assert find_head(nn.Linear(4, 2), torch.rand(3, 4)).name == ""


def test_features_reproduce_the_logits_and_keep_the_graph(x: Tensor) -> None:
    net = Net().double().eval()
    x = x.double().requires_grad_()
    head = find_head(net, x)
    phi = features(net, head, x)
    assert torch.equal(F.linear(phi, head.linear.weight, head.linear.bias), net(x))
    (through_head,) = torch.autograd.grad(head.linear(phi)[:, 0].sum(), x)
    (direct,) = torch.autograd.grad(net(x)[:, 0].sum(), x)
    torch.testing.assert_close(through_head, direct, rtol=1e-12, atol=0)


def test_modes_statistics_and_hooks_are_left_as_they_were(x: Tensor) -> None:
    net = Net()
    net.train()
    net.backbone[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    find_head(net, x)
    assert [m.training for m in (net, net.head, net.backbone, net.backbone[1])] == [True, True, True, False]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.head._forward_hooks
    assert not net.head._forward_pre_hooks


def test_modes_come_back_when_the_forward_fails() -> None:
    net = Net()
    net.backbone[1].eval()
    with pytest.raises(RuntimeError):
        find_head(net, torch.rand(2, 1, 9, 9))
    assert net.training
    assert net.head.training
    assert not net.backbone[1].training
    assert not net.head._forward_hooks
    with pytest.raises(ZeroDivisionError), eval_mode(net):
        raise ZeroDivisionError
    assert net.training
    assert not net.backbone[1].training


def test_compiled_in_place(x: Tensor) -> None:
    net = Net()
    net.compile(backend="eager")
    compiled = net._compiled_call_impl
    head = find_head(net, x)
    assert head.name == "head"
    assert features(net, head, x).shape == (6, 5)
    assert net._compiled_call_impl is compiled


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (lambda z: z.softmax(-1), "followed by something"),
        (lambda z: z.relu_(), "followed by something"),
        (lambda z: z * 1.0, "followed by something"),
        (lambda z: z.abs().add(1).log(), "followed by something"),
        (lambda z: z[:, :2], "gives \\(6, 3\\) but the model returns \\(6, 2\\)"),
        (lambda z: (z, z), "returns tuple"),
        (lambda z: {"logits": z}, "returns dict"),
    ],
)
def test_output_that_is_not_the_layers_own_is_refused(x: Tensor, after, words: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsuitableError, match=words):
        find_head(Net(after=after), x)


def test_relu_that_changes_nothing_on_the_example_is_refused_too(x: Tensor) -> None:
    net = Net(after=torch.relu)
    with torch.no_grad():
        net.head.bias.fill_(100.0)
    with pytest.raises(UnsuitableError, match="followed by something"):
        find_head(net, x)


def test_no_linear_at_all(x: Tensor) -> None:
    with pytest.raises(UnsuitableError, match=r"no nn\.Linear is called"):
        find_head(nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), x)


def test_frozen_weight_and_frozen_bias(x: Tensor) -> None:
    net = Net()
    net.head.requires_grad_(False)
    with pytest.raises(UnsuitableError, match="weight is frozen"):
        find_head(net, x)
    net.head.weight.requires_grad_(True)
    with pytest.raises(UnsuitableError, match="bias is frozen"):
        find_head(net, x)


def test_reparametrised_head_is_refused(x: Tensor) -> None:
    for wrap in (torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm):
        net = Net()
        wrap(net.head)
        with pytest.raises(UnsuitableError, match="computed from other parameters"):
            find_head(net, x)
    net = Net()
    prune.l1_unstructured(net.head, "weight", amount=3)
    with pytest.raises(UnsuitableError, match="computed from other parameters"):
        find_head(net, x)


def test_tied_head_is_refused_by_name(x: Tensor) -> None:
    net = Net()
    net.decoy.weight = net.head.weight
    with pytest.raises(UnsuitableError, match=r"tied to decoy\.weight"):
        find_head(net, x)
    net = Net()
    net.alias = net.head  # the same layer under two names is one layer, but its parameters then have two names
    with pytest.raises(UnsuitableError, match=r"tied to alias\.weight, alias\.bias"):
        find_head(net, x)


def test_adapter_and_hook_that_add_to_the_output_are_refused(x: Tensor) -> None:
    class LoRALinear(nn.Linear):
        def __init__(self, i: int, o: int) -> None:
            super().__init__(i, o)
            self.lora_A, self.lora_B = nn.Parameter(torch.ones(2, i)), nn.Parameter(torch.ones(o, 2))

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + input @ self.lora_A.T @ self.lora_B.T

    net = Net()
    net.head = LoRALinear(5, 3)
    with pytest.raises(UnsuitableError, match="adapter such as LoRA"):
        find_head(net, x)
    net = Net()
    net.head.register_forward_hook(lambda m, a, out: out + 1)
    with pytest.raises(UnsuitableError, match="or a hook"):
        find_head(net, x)


def test_adapter_around_a_linear_is_named(x: Tensor) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.lora_A = base, nn.Linear(base.in_features, 2)
            self.lora_B = nn.Linear(2, base.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

    net = Net()
    net.head = Adapter(net.head)
    with pytest.raises(UnsuitableError, match="LoRA adapters at head"):
        find_head(net, x)


def test_head_on_sequences_or_called_twice_is_refused() -> None:
    with pytest.raises(UnsuitableError, match=r"\(2, 7, 4\) for 2 samples"):
        find_head(nn.Linear(4, 3), torch.rand(2, 7, 4))
    shared = nn.Linear(4, 4)
    with pytest.raises(UnsuitableError, match="called 2 times"):
        find_head(nn.Sequential(shared, nn.ReLU(), shared), torch.rand(2, 4))


def test_all_reasons_are_listed_together() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.layer.requires_grad_(False)
            self.decoy = nn.Linear(4, 4)
            self.decoy.weight = self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    with pytest.raises(UnsuitableError) as caught:
        find_head(Twice(), torch.rand(2, 4))
    for word in ("called 2 times", "frozen", "tied to decoy.weight"):
        assert word in str(caught.value)
