"""The chunked loss against the plain one: same values, same gradients, without the logits."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import cross_entropy
from nanochat.cross_entropy import softcap_cross_entropy
from tests.examples import examples

CAP = 15.0


def plain(hidden, weight, targets, reduction):
    logits = CAP * torch.tanh(hidden.double() @ weight.double().t() / CAP)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


def problem(seed, rows, vocab, width=8, spread=1.0, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = (spread * torch.randn(vocab, width, generator=generator)).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -1
    return hidden, weight, targets


@settings(max_examples=examples(40), deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 300), vocab=st.integers(2, 200), spread=st.sampled_from([0.0, 1.0, 30.0]),
       reduction=st.sampled_from(["mean", "sum", "none"]))
def test_equals_the_plain_loss(seed, rows, vocab, spread, reduction):
    hidden, weight, targets = problem(seed, rows, vocab, spread=spread)
    targets[0] = 0  # at least one counts
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 1)  # the smallest chunks there are: 64 rows
        loss = softcap_cross_entropy(hidden, weight, targets, CAP, reduction)
    want = plain(hidden, weight, targets, reduction)
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-5)
    upstream = torch.rand_like(loss) + 0.5
    got = torch.autograd.grad(loss, (hidden, weight), upstream)
    expected = torch.autograd.grad(want, (hidden, weight), upstream.double())
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=2e-5 * max(1.0, float(b.abs().max())))


def test_bfloat16_gradients_are_those_of_a_bf16_matmul():
    hidden, weight, targets = problem(1, 500, 300, width=64, spread=0.2)
    hidden, weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    loss = softcap_cross_entropy(hidden, weight, targets, CAP)
    want = plain(hidden, weight, targets, "mean")
    assert loss.dtype == torch.float32 and abs(loss.item() - want.item()) < 2e-3
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(want, (hidden, weight))):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b.double()).norm() < 0.01 * b.double().norm()


def test_float16_gradients_survive_loss_scaling():
    """The gradient of one logit of a mean over many tokens is below what float16 can hold, unless it is scaled first."""
    hidden, weight, targets = problem(3, 1000, 2000, width=16, spread=0.1)
    hidden, weight = (x.detach().half().requires_grad_() for x in (hidden, weight))
    loss_scale = 65536.0
    got = torch.autograd.grad(softcap_cross_entropy(hidden, weight, targets, CAP) * loss_scale, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(plain(hidden, weight, targets, "mean"), (hidden, weight))):
        assert (a.double() / loss_scale - b.double()).norm() < 0.002 * b.double().norm()


def test_never_holds_all_logits():
    """The largest tensor stays a chunk: 4,096 rows of 4,096 logits would be 16 million elements."""
    hidden, weight, targets = problem(2, 4096, 4096)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    with Watch(), torch.no_grad():
        cross_entropy._forward._init_fn(  # the operator's inside, which dispatch would hide
            hidden.detach(), weight.detach(), targets, CAP, True)
    assert max(sizes) <= cross_entropy.CHUNK_ELEMENTS["cpu"] < 4096 * 4096


def test_operator_contract():
    hidden, weight, targets = problem(3, 10, 7)
    torch.library.opcheck(cross_entropy._forward, (hidden, weight, targets, CAP, True), test_utils=("test_schema", "test_faketensor"))


def test_no_target_counts():
    hidden, weight, _ = problem(4, 3, 5)
    assert softcap_cross_entropy(hidden, weight, torch.full((3,), -1), CAP).isnan()
    assert softcap_cross_entropy(hidden, weight, torch.full((3,), -1), CAP, "sum") == 0


def test_unknown_reduction():
    hidden, weight, targets = problem(5, 3, 5)
    with pytest.raises(ValueError, match="max"):
        softcap_cross_entropy(hidden, weight, targets, CAP, "max")


@pytest.mark.parametrize("compiler", [True, False])
def test_bfloat16_with_and_without_a_compiler(monkeypatch, compiler):
    """Rows that do not count get no gradient, logits far beyond the cap are fine, and a NaN is no number."""
    if not compiler:
        monkeypatch.setattr(cross_entropy, "native", lambda path: None)
    hidden, weight, targets = problem(6, 130, 300, width=32, spread=3.0)
    hidden, weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    loss, want = softcap_cross_entropy(hidden, weight, targets, CAP), plain(hidden, weight, targets, "mean")
    assert abs(loss.item() - want.item()) < 2e-2
    got, expected = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(want, (hidden, weight))
    for a, b in zip(got, expected):
        assert (a.double() - b.double()).norm() < 0.02 * b.double().norm()
    assert not got[0][targets < 0].any()
    with torch.no_grad():
        hidden[5, 0] = float("nan")
        targets[5] = 1
        assert softcap_cross_entropy(hidden, weight, targets, CAP).isnan()
