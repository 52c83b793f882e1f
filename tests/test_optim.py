"""MuonAdamW: AdamW is PyTorch's, Muon orthogonalizes, decay is cautious, misuse is named."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.optim import MuonAdamW, orthogonalize
from tests.examples import examples

MUON = dict(kind="muon", lr=0.02, momentum=0.95, ns_steps=5, beta2=0.9, weight_decay=0.0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_pytorchs(weight_decay):
    torch.manual_seed(0)
    start = torch.randn(7, 5)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings_ = dict(lr=0.05, betas=(0.8, 0.95), eps=1e-8, weight_decay=weight_decay)
    a, b = MuonAdamW([dict(kind="adamw", params=[ours], **settings_)]), torch.optim.AdamW([theirs], **settings_)
    for _ in range(5):
        ours.grad = torch.randn(7, 5)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@settings(max_examples=examples(25), deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 3), rows=st.integers(1, 40), columns=st.integers(1, 40))
def test_orthogonalized_singular_values_are_near_one(seed, count, rows, columns):
    X = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))
    spectrum = torch.linalg.svdvals(X)
    # directions that are not tiny against the largest one
    kept = spectrum > 0.05 * spectrum[:, :1]
    result = torch.linalg.svdvals(orthogonalize(X, 5))
    assert ((result > 0.5) & (result < 1.5))[kept].all()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (2, 12)])
def test_muon_updates_have_the_size_of_the_learning_rate(shape):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(3)]
    for p in params:
        p.grad = torch.randn(shape) * 1e-4  # the scale of the gradient must not matter
    MuonAdamW([dict(MUON, params=params)]).step()
    rows, columns = shape
    for p in params:
        assert float(p.norm()) == pytest.approx(0.02 * max(1, rows / columns) ** 0.5 * min(rows, columns) ** 0.5, rel=1e-3)


def test_decay_is_cautious():
    """Only weights that the update already moves towards zero decay."""
    torch.manual_seed(0)
    start, grad = torch.randn(6, 6), torch.randn(6, 6)

    def step(weight_decay):
        p = torch.nn.Parameter(start.clone())
        p.grad = grad.clone()
        MuonAdamW([dict(MUON, params=[p], weight_decay=weight_decay)]).step()
        return p.detach()

    plain, decayed = step(0.0), step(5.0)
    towards_zero = (start - plain) * start >= 0
    torch.testing.assert_close(decayed, plain - 0.02 * 5.0 * start * towards_zero)


def test_converges():
    torch.manual_seed(0)
    target = torch.randn(8, 8)
    p = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = MuonAdamW([dict(MUON, params=[p], lr=0.05)])
    for _ in range(80):
        p.grad = p.detach() - target
        optimizer.step()
    assert (p - target).norm() < 0.5 * target.norm()


def test_state_dict_round_trip_continues_identically():
    def build():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(3)]
        return params, MuonAdamW([dict(kind="adamw", params=params[:1], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0), dict(MUON, params=params[1:])])

    def steps(params, optimizer, seeds):
        for seed in seeds:
            for i, p in enumerate(params):
                p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * seed + i))
            optimizer.step()

    params, optimizer = build()
    steps(params, optimizer, range(2))
    weights, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    other_params, other = build()
    for p, weight in zip(other_params, weights):
        p.data.copy_(weight)
    other.load_state_dict(state)
    steps(params, optimizer, range(2, 5))
    steps(other_params, other, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(params, other_params))


def test_misuse_is_named():
    with pytest.raises(ValueError, match="sgd"):
        MuonAdamW([dict(kind="sgd", params=[torch.nn.Parameter(torch.zeros(2))])])
    with pytest.raises(ValueError, match="one shape"):
        MuonAdamW([dict(MUON, params=[torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2, 3))])])
