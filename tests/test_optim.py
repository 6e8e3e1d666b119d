"""Optimizers against their formulas by hand, against torch's own where there is one, and rotations as orthogonal."""

import copy
import math

import pytest
import torch
from torch import nn

from phasequant.errors import PhaseQuantError
from phasequant.optim import (
    CayleySGD,
    Zeta,
    cayley_step,
    coordinate_whiten,
    newton_schulz,
    orthogonalization_error,
    orthonormality_error,
    qr_orthogonal,
    zeta_update,
)

ORDERS = [("coordinate", "spectral"), ("spectral",), ("coordinate",), ("spectral", "coordinate")]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(p, n, seed=0, dtype=torch.float64):
    return qr_orthogonal(normal(n, p, seed=seed, dtype=dtype)).mT.contiguous()


def train(optimizer, params, grads):
    """One step for each row of gradients; None leaves a parameter without one."""
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = g if g is None else g.clone()
        optimizer.step()


def gradients(params, steps, seed=1):
    return [
        [normal(*p.shape, seed=seed + 100 * step + i, dtype=p.dtype) for i, p in enumerate(params)]
        for step in range(steps)
    ]


def parameters(*shapes, dtype=torch.float64):
    return [nn.Parameter(normal(*shape, seed=50 + i, dtype=dtype)) for i, shape in enumerate(shapes)]


def quintic_by_hand(x, eps):
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / ((x * x).sum().sqrt() + eps)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def zeta_by_hand(w, grads, stages, lr, betas, eps, decay):
    w, m, v = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
    for g in grads:
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        u = m
        for stage in stages:
            u = u / (v.sqrt() + eps) if stage == "coordinate" else quintic_by_hand(u, eps)
        step = 0.2 * math.sqrt(w.numel()) / ((u * u).sum().sqrt() + eps) * u
        w = (1 - lr * decay) * w - lr * step
    return w


# --- Zeta ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", ORDERS, ids="-".join)
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5)], ids=str)
def test_matrix_steps_by_hand(shape, stages):
    (w,) = params = parameters(shape)
    options = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6}
    grads = gradients(params, 6)
    expected = zeta_by_hand(w.detach(), [row[0] for row in grads], stages, **options, decay=0.3)
    train(Zeta(params, **options, weight_decay=0.3, stages=stages), params, grads)
    assert torch.allclose(w, expected, rtol=0, atol=1e-12)


def test_vector_steps_are_adamw():
    params, others = parameters((7,), ()), parameters((7,), ())
    grads = gradients(params, 6)
    grads[2][1] = None  # counts of steps differ between parameters
    options = {"lr": 0.02, "eps": 1e-7, "weight_decay": 0.3}
    train(Zeta(params, **options, betas=(0.5, 0.5), vector_betas=(0.8, 0.97)), params, grads)
    train(torch.optim.AdamW(others, **options, betas=(0.8, 0.97)), others, grads)
    for mine, theirs in zip(params, others, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


def test_spectral_alone_turns_as_muon_without_nesterov():
    params, others = parameters((12, 20), dtype=torch.float32), parameters((12, 20), dtype=torch.float32)
    start, grads = params[0].detach().clone(), gradients(params, 3)
    zeta = Zeta(params, lr=0.01, betas=(0.95, 0.9), weight_decay=0.0, stages=("spectral",), ns_dtype=torch.bfloat16)
    muon = torch.optim.Muon(others, lr=0.01, weight_decay=0, nesterov=False, adjust_lr_fn="match_rms_adamw")
    train(zeta, params, grads)
    train(muon, others, grads)
    mine, theirs = ((p.detach() - start).flatten() for p in (*params, *others))
    assert torch.cosine_similarity(mine, theirs, dim=0) > 0.999
    assert mine.norm() == pytest.approx(theirs.norm().item(), rel=0.2)  # Muon takes √min(m, n) for ‖U‖_F


def test_step_is_matched_in_rms_and_free_of_the_gradients_scale():
    momentum, second = normal(2, 5, 8), normal(2, 5, 8, seed=1) ** 2
    for stages in ORDERS:
        update = zeta_update(momentum, second, stages)
        assert torch.allclose(update.square().mean((-2, -1)).sqrt(), torch.tensor(0.2, dtype=torch.float64))
        scaled = zeta_update(1e3 * momentum, 1e6 * second, stages)
        assert torch.allclose(update, scaled, atol=1e-5)
    assert zeta_update(torch.zeros(3, 4), torch.zeros(3, 4)).count_nonzero() == 0


def test_batches_and_stacks_equal_one_by_one(monkeypatch):
    shapes = [(2, 3, 5, 7), (7, 5), (5, 7), (5, 7), (4,), (9,), (3, 0)]
    together, chunked, apart = (parameters(*shapes) for _ in range(3))
    grads = gradients(together, 4)
    train(Zeta(together, lr=0.02), together, grads)
    for i, p in enumerate(apart[1:], 1):
        train(Zeta([p], lr=0.02), [p], [[row[i]] for row in grads])
    matrices = [nn.Parameter(matrix.clone()) for matrix in apart[0].detach().flatten(0, 1)]
    for i, p in enumerate(matrices):
        train(Zeta([p], lr=0.02), [p], [[row[0].flatten(0, 1)[i]] for row in grads])
    assert torch.allclose(together[0], torch.stack(matrices).view(2, 3, 5, 7), rtol=0, atol=1e-12)
    for mine, alone in zip(together[1:], apart[1:], strict=True):
        assert torch.allclose(mine, alone, rtol=0, atol=1e-12)
    monkeypatch.setattr("phasequant.optim.zeta.STACKED", 80)  # two matrices at a time
    train(Zeta(chunked, lr=0.02), chunked, grads)
    for mine, part in zip(together, chunked, strict=True):
        assert torch.allclose(mine, part, rtol=0, atol=1e-12)


def test_a_layout_of_memory_is_only_a_layout():
    w = normal(6, 4).T
    params, others = [nn.Parameter(w)], [nn.Parameter(w.contiguous())]
    grads = gradients(others, 3)
    train(Zeta(params), params, grads)
    train(Zeta(others), others, grads)
    assert not params[0].is_contiguous() and torch.allclose(params[0], others[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("stages", ORDERS, ids="-".join)
def test_state_round_trip_continues_bit_for_bit(stages, tmp_path):
    shapes = [(6, 4), (4, 6), (2, 3, 3), (5,), ()]
    params = parameters(*shapes, dtype=torch.float32)
    grads = gradients(params, 8)
    first = Zeta(params, lr=0.01, stages=stages)
    train(first, params, grads[:5])
    copies = copy.deepcopy(params)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Zeta(copies, lr=0.5)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(first, params, grads[5:])
    train(second, copies, grads[5:])
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    keeps_second = any("second" in first.state[p] for p in params if p.ndim > 1)
    assert keeps_second == ("coordinate" in stages)  # V costs memory only where it is read


def test_groups_have_their_own_options():
    a, b, c = params = parameters((5, 7), (5, 7), (5, 7))
    start = [p.detach().clone() for p in params]
    groups = [
        {"params": [a]},
        {"params": [b], "lr": 0.04, "weight_decay": 0.5},
        {"params": [c], "stages": ("spectral",)},
    ]
    optimizer = Zeta(groups, lr=0.02, weight_decay=0.0)
    train(optimizer, params, grads := gradients(params, 3))
    for i, (lr, decay, stages) in enumerate([(0.02, 0, ORDERS[0]), (0.04, 0.5, ORDERS[0]), (0.02, 0, ORDERS[1])]):
        expected = zeta_by_hand(start[i], [row[i] for row in grads], stages, lr, (0.9, 0.95), 1e-8, decay)
        assert torch.allclose(params[i], expected, rtol=0, atol=1e-12)


def test_closure_scheduler_and_a_tensor_as_learning_rate():
    w, target = nn.Parameter(torch.zeros(8, 8)), normal(8, 8, dtype=torch.float32)
    optimizer = Zeta([w], lr=torch.tensor(0.4), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)

    def closure():
        optimizer.zero_grad()
        loss = (w - target).square().mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(100):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that is visible")
def test_a_captured_step_equals_an_eager_one():
    shapes = [(16, 24), (24, 16), (2, 16, 24), (16,), ()]
    params, others = ([nn.Parameter(p.detach().cuda()) for p in parameters(*shapes, dtype=torch.float32)] for _ in "ab")
    for p, q in zip(params, others, strict=True):
        p.grad = normal(*p.shape, seed=9, dtype=torch.float32).cuda()
        q.grad = p.grad.clone()
    eager, captured = Zeta(params, lr=0.01), Zeta(others, lr=0.01)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        captured.step()  # makes the state
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        eager.step()
    for mine, theirs in zip(params, others, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-5)


def test_refuses_what_it_cannot_do():
    w = parameters((3, 4))
    with pytest.raises(PhaseQuantError, match="did you mean 'spectral'"):
        Zeta(w, stages=("coordinate", "spectrl"))
    for options in (
        {"stages": ()},
        {"stages": "spectral"},
        {"stages": ("spectral", "spectral")},
        {"lr": -1.0},
        {"betas": (0.9, 1.0)},
        {"vector_betas": (-0.1, 0.9)},
        {"eps": float("nan")},
    ):
        with pytest.raises(PhaseQuantError, match="give"):
            Zeta(w, **options)
    for dtype in (torch.bfloat16, torch.float16, torch.complex64):
        with pytest.raises(PhaseQuantError, match="float32 weights"):
            Zeta([nn.Parameter(torch.zeros(3, 4, dtype=dtype))])
    optimizer = Zeta(w)
    with pytest.raises(PhaseQuantError):
        optimizer.add_param_group({"params": parameters((2, 2)), "stages": ("polar",)})
    assert len(optimizer.param_groups) == 1
    embedding, dense = nn.Embedding(4, 3, sparse=True), parameters((3, 4), dtype=torch.float32)
    optimizer = Zeta([*dense, embedding.weight])
    dense[0].grad = torch.ones(3, 4)
    embedding(torch.tensor([1])).sum().backward()
    before = dense[0].detach().clone()
    with pytest.raises(PhaseQuantError, match="sparse"):
        optimizer.step()
    assert torch.equal(dense[0], before)  # refused before anything moved
    with pytest.raises(PhaseQuantError, match="second moment"):
        zeta_update(normal(3, 4), None)


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_newton_schulz_levels_singular_values(shape, dtype):
    side = min(shape)
    singular = torch.logspace(-1.5, 0, side, dtype=torch.float64)
    u, v = rotation(side, shape[0]).mT, rotation(side, shape[1], seed=1)
    out = newton_schulz(u @ (singular[:, None] * v), dtype=dtype)
    found = torch.linalg.svdvals(out)
    assert out.dtype == torch.float64 and found.min() > 0.5 and found.max() < 1.5
    slack = 1e-8 if dtype is None else 0.05
    mixed = u.mT @ out @ v.mT  # diagonal: the singular vectors stay
    assert (mixed - mixed.diagonal().diag()).abs().max() < slack


def test_orthogonalization_error_is_the_spread_of_squared_singular_values():
    x = normal(3, 6, 10)
    squares = torch.linalg.svdvals(x) ** 2
    expected = squares.std(-1, unbiased=False) / squares.mean(-1)
    assert torch.allclose(orthogonalization_error(x), expected)
    assert torch.allclose(orthogonalization_error(7 * x.mT), expected)
    assert orthogonalization_error(3 * rotation(6, 10)) < 1e-12
    assert orthogonalization_error(normal(6, 1) @ normal(1, 10)) == pytest.approx(5**0.5)


@pytest.mark.parametrize("shape", [(48, 48), (32, 64), (64, 32)], ids=str)
def test_whitening_by_coordinate_first_orthogonalizes_badly_scaled_momentum(shape):
    rows, columns = 10 ** (2 * normal(shape[0], 1, seed=3).tanh()), 10 ** (2 * normal(1, shape[1], seed=4).tanh())
    mean, scaled, plain = normal(*shape, seed=5), [0.0, 0.0], [0.0, 0.0]
    for step in range(30):
        g = mean + normal(*shape, seed=6 + step)
        for moments, gradient in ((plain, g), (scaled, rows * g * columns)):
            moments[0] = 0.9 * moments[0] + 0.1 * gradient
            moments[1] = 0.95 * moments[1] + 0.05 * gradient**2
    error = {stages: orthogonalization_error(zeta_update(*scaled, stages, eps=1e-12)).item() for stages in ORDERS}
    right, spectral, coordinate, wrong = (error[stages] for stages in ORDERS)
    assert right < 0.6 * spectral and spectral < wrong and right < 0.8 * coordinate
    # the scales of rows and columns cancel in M/√V: the result is that of gradients without them
    assert torch.allclose(coordinate_whiten(*scaled, 0.0), coordinate_whiten(*plain, 0.0))


# --- Cayley SGD ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.01, 1.5])  # a short step, and one at its bound
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_cayley_steps_by_hand(lr, momentum):
    p, n = 4, 6
    w = nn.Parameter(rotation(p, n))
    grads = gradients([w], 3)
    x, v = w.detach().clone(), torch.zeros(n, p, dtype=torch.float64)
    for (g,) in grads:
        x = x / x.norm(dim=1, keepdim=True)
        v = momentum * v - g.T
        hat = v @ x - 0.5 * x.T @ (x @ v @ x)
        skew = hat - hat.T
        alpha = min(lr, 1 / (max(skew[:, j].abs().sum().item() for j in range(n)) + 1e-8))
        y = x.T + alpha * v
        for _ in range(5):
            y = x.T + alpha / 2 * skew @ (x.T + y)
        x, v = y.T, skew @ x.T
    train(CayleySGD([w], lr=lr, momentum=momentum, tolerance=1.0), [w], grads)
    assert torch.allclose(w, x, rtol=0, atol=1e-12)


def test_cayley_iteration_converges_to_the_transform():
    x, g = rotation(4, 6), normal(4, 6, seed=2)
    moved, velocity = cayley_step(x, -g.mT, 0.05, iterations=60)
    tangent = velocity @ x - 0.5 * x.mT @ (x @ velocity @ x)
    skew = tangent - tangent.mT
    one = torch.eye(6, dtype=torch.float64)
    exact = torch.linalg.solve(one - 0.025 * skew, (one + 0.025 * skew) @ x.mT).mT
    assert torch.allclose(moved, exact, rtol=0, atol=1e-12) and orthonormality_error(moved) < 1e-12
    assert (g * velocity.mT).sum() < 0  # downhill
    assert (x @ velocity + (x @ velocity).mT).abs().max() < 1e-12  # tangent


@pytest.mark.parametrize("shape", [(4, 8), (8, 8), (24, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cayley_stays_orthogonal(shape, dtype):
    w = nn.Parameter(rotation(*shape, dtype=dtype))
    optimizer, worst = CayleySGD([w], momentum=0.5), 0.0
    for step in range(300):
        w.grad = normal(*shape, seed=step, dtype=dtype)
        optimizer.step()
        worst = max(worst, orthonormality_error(w.detach()).item())
    assert worst <= 1e-6


def test_without_retraction_it_would_not():
    w = nn.Parameter(rotation(4, 8))
    train(CayleySGD([w], tolerance=1.0), [w], gradients([w], 50))
    assert orthonormality_error(w.detach()) > 1e-5


def test_cayley_finds_the_procrustes_rotation():
    """max tr(X·C) over orthonormal X is Σσ(C); the square case starts with the optimum's determinant."""
    for p, n in ((5, 12), (8, 8)):
        c = normal(n, p, seed=3)
        u, singular, v = torch.linalg.svd(c, full_matrices=False)
        start = rotation(p, n)
        if p == n and torch.det(start) * torch.det(u @ v) < 0:
            start[0] *= -1
        w = nn.Parameter(start)
        optimizer = CayleySGD([w])
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        for _ in range(100):
            optimizer.zero_grad()
            (-(w @ c).trace()).backward()
            optimizer.step()
            scheduler.step()
        assert (w @ c).trace().item() == pytest.approx(singular.sum().item(), rel=1e-3)
        assert torch.allclose(w, (u @ v).T, atol=0.05)


def test_cayley_batch_equals_one_by_one_and_continues_from_its_state():
    batch = torch.stack([rotation(3, 5, seed=s) for s in range(4)]).view(2, 2, 3, 5)
    together = nn.Parameter(batch.clone())
    apart = [nn.Parameter(x.clone()) for x in batch.flatten(0, 1)]
    grads = gradients([together], 6)
    optimizer = CayleySGD([together], momentum=0.5, tolerance=1.0)
    train(optimizer, [together], grads[:3])
    resumed = nn.Parameter(together.detach().clone())
    other = CayleySGD([resumed], tolerance=1.0)
    other.load_state_dict(optimizer.state_dict())
    train(optimizer, [together], grads[3:])
    train(other, [resumed], grads[3:])
    assert torch.equal(together, resumed)
    train(CayleySGD(apart, momentum=0.5, tolerance=1.0), apart, [[*row[0].flatten(0, 1).unbind()] for row in grads])
    assert torch.allclose(together.flatten(0, 1), torch.stack(list(apart)), rtol=0, atol=1e-12)


def test_cayley_refuses_what_it_cannot_keep_orthonormal():
    for x, reason in (
        (normal(4, 4), "not orthonormal"),
        (rotation(4, 6).mT, "orthonormal rows"),
        (normal(4), "orthonormal rows"),
        (torch.eye(4, dtype=torch.bfloat16), "too coarse"),
        (torch.full((2, 2), float("nan")), "not orthonormal"),
    ):
        with pytest.raises(PhaseQuantError, match=reason):
            CayleySGD([nn.Parameter(x)])
    for options in ({"lr": -1.0}, {"momentum": 1.0}, {"iterations": 0}):
        with pytest.raises(PhaseQuantError, match="give lr"):
            CayleySGD([nn.Parameter(torch.eye(3))], **options)


# --- QR-Orth ------------------------------------------------------------------------------------------------------


def test_qr_orthogonal_is_orthogonal_and_the_identity_on_orthogonal_matrices():
    z = normal(2, 3, 9, 5)
    q = qr_orthogonal(z)
    assert torch.allclose(q.mT @ q, torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5))
    assert torch.allclose(qr_orthogonal(q), q)
    upper = normal(5, 5, seed=1).triu(1) + torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    assert torch.allclose(qr_orthogonal(z @ upper), q)  # the freedom of Z
    flip = torch.diag(torch.tensor([1.0, -1, 1, 1, -1], dtype=torch.float64))
    assert torch.allclose(qr_orthogonal(z @ flip), q @ flip)
    near = qr_orthogonal(q + 1e-9 * normal(2, 3, 9, 5, seed=2))
    assert (near - q).abs().max() < 1e-8  # continuous: no sign jumps


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (2, 3, 3)], ids=str)
def test_qr_orthogonal_gradient(shape):
    z = normal(*shape).requires_grad_()
    assert torch.autograd.gradcheck(qr_orthogonal, z)
    (qr_orthogonal(z) * normal(*shape, seed=1)).sum().backward()
    assert (z * z.grad).sum((-2, -1)).abs().max() < 1e-12  # none along Z itself


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, Zeta])
def test_qr_orthogonal_trains_with_any_optimizer(make):
    c = normal(5, 12, seed=3)
    best = torch.linalg.svdvals(c).sum().item()
    z = nn.Parameter(rotation(5, 12).mT.contiguous())
    optimizer = make([z], lr=0.1, weight_decay=0.0)
    for _ in range(150):
        optimizer.zero_grad()
        (-(c @ qr_orthogonal(z)).trace()).backward()
        optimizer.step()
    assert (c @ qr_orthogonal(z)).trace().item() == pytest.approx(best, rel=1e-3)


def test_the_last_column_of_a_square_free_matrix_is_given_by_the_others():
    z = normal(6, 6).requires_grad_()
    (qr_orthogonal(z) * normal(6, 6, seed=1)).sum().backward()
    assert z.grad[:, -1].abs().max() < 1e-12 < z.grad[:, -2].abs().max()


def test_qr_orthogonal_refuses_wide_and_coarse_matrices():
    with pytest.raises(PhaseQuantError, match="transpose"):
        qr_orthogonal(normal(3, 5))
    with pytest.raises(PhaseQuantError, match="float32"):
        qr_orthogonal(torch.eye(3, dtype=torch.bfloat16))
