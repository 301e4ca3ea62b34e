"""The card enforces CUDA's rules, so that code which breaks them fails; see test_rehearsal.py."""

import threading

import pytest
import torch
import torch.nn.functional as F

from tests.rehearsal.card import OnCard

HERE = torch.ones(4)
ELSEWHERE = "Expected all tensors to be on the same device"


def there(*shape):
    return torch.ones(*shape, device="cuda")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: there(4) + HERE, RuntimeError, ELSEWHERE),
        (lambda: HERE + there(4), RuntimeError, ELSEWHERE),
        (lambda: HERE.add_(there(1)), RuntimeError, ELSEWHERE),
        (lambda: torch.tensor(1.0).add_(there(1)[0]), RuntimeError, ELSEWHERE),
        (lambda: torch.cat([there(4), HERE]), RuntimeError, ELSEWHERE),
        (lambda: torch.stack([there(1)[0], torch.tensor(1.0)]), RuntimeError, ELSEWHERE),
        (lambda: there(2, 4) @ HERE, RuntimeError, ELSEWHERE),
        (lambda: F.linear(there(2, 4), torch.ones(3, 4)), RuntimeError, ELSEWHERE),
        (lambda: torch.where(HERE > 0, there(4), 0.0), RuntimeError, ELSEWHERE),
        (lambda: torch.where(there(4) > 0, there(4), there(4), out=torch.empty(4)), RuntimeError, ELSEWHERE),
        (lambda: there(4).gather(0, torch.tensor([1])), RuntimeError, ELSEWHERE),
        (lambda: there(4).masked_fill(HERE > 0, 1.0), RuntimeError, ELSEWHERE),
        (lambda: HERE[torch.tensor([1], device="cuda")], RuntimeError, "indices should be either on cpu"),
        (lambda: there(4).index_put((torch.tensor([1, 2]),), HERE[:2]), RuntimeError, ELSEWHERE),
        (lambda: torch.randn(2, generator=torch.Generator(), device="cuda"), RuntimeError, "Expected a 'cuda' device"),
        (lambda: there(4).numpy(), TypeError, "can't convert cuda:0 device type tensor to numpy"),
    ],
)  # fmt: skip
def test_arguments_that_cuda_refuses(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


@pytest.mark.parametrize(
    "right",
    [
        lambda: there(4) * torch.tensor(2.0),
        lambda: torch.tensor(2.0) * there(4),
        lambda: there(4)[torch.tensor([0, 1])],
        lambda: there(4)[HERE > 0],
        lambda: there(4).index_put((torch.tensor([1]),), torch.tensor(5.0)),
        lambda: there(4).copy_(HERE),
        lambda: HERE.to("cuda", torch.float64),
        lambda: torch.tensor([1, 2], device="cuda"),
        lambda: torch.nn.Linear(4, 3).cuda()(there(2, 4)),
        lambda: torch.arange(3, device=torch.device("cuda")),
    ],
)
def test_arguments_that_cuda_accepts(right):
    out = right()
    assert isinstance(out, OnCard)
    assert out.device == torch.device("cuda:0")
    assert out.cpu().device.type == "cpu"


def test_a_module_is_moved_in_place():
    linear = torch.nn.Linear(4, 3)
    weight = linear.weight
    assert linear.cuda().weight is weight
    assert weight.is_cuda
    assert isinstance(weight, torch.nn.Parameter)


def test_the_backward_pass_runs_in_the_devices_own_thread():
    x, threads = there(3).requires_grad_(), []
    y = x * 2
    y.register_hook(lambda g: threads.append(threading.get_ident()))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [2.0, 2.0, 2.0]
    assert threads != [threading.get_ident()]


def test_autocast_is_that_of_cuda():
    with torch.autocast("cuda", torch.bfloat16):
        out = F.linear(there(2, 4), there(3, 4))
        assert out.dtype == torch.bfloat16
        assert out.softmax(-1).dtype == torch.float32  # on the CPU it stays bfloat16
