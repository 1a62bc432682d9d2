"""Is the shipped EASGD what the theory is about? Its map, its variance, its momentum.

Nothing is re-implemented: the linear map of an update is obtained by applying the shipped classes
(`EASGD`, `Center`, `Gathered`) to basis vectors, in fp64, on F(x) = h x^2 / 2.

    region     spectral radius of a round-robin pass over p workers, over a grid of (eta, alpha); no
               point of the region that `stable` knows may be above 1 + 1e-9. ADMM, written here as
               it is no method of ours, is unstable where the thesis says
    variance   of the centre of synchronous EASGD after t steps: the covariance recursion of the
               shipped map against the closed form
    momentum   EASGD with the moving rate -delta and centre rate 1 is heavy-ball momentum

    python -m bench.easgd_theory [--json]       exit code 1 where a bar fails

Source: Zhang, thesis, arXiv 1605.02216, chapters 3 to 5.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from bench.feedback import Row, conclude, number, verdict
from commlib import Communicator
from commlib.optim import EASGD, Center, Gathered, Link, local, stable
from commlib.transport import Transport, run_ranks

RESULTS = Path(__file__).parent / "results" / "easgd_theory.jsonl"
WORKERS = (1, 2, 3, 4, 8, 16)
BELOW = 1 + 1e-9
# p, eta h, beta, and the centre's variance after many steps where a figure is known, for sigma = 1
VARIANCES = ((4, 0.1, 0.9, 1.045584e-2), (8, 0.5, 0.9, 3.482972e-2), (16, 1.0, 0.5, None))


def maps(workers: int, etas: torch.Tensor, alpha: float) -> np.ndarray:
    """The map of one round-robin pass, (etas, p + 1, p + 1), last the centre.

    Coordinates are independent: one run of shipped objects has all columns and all curvatures, with
    the learning rate 1.
    """
    p, n = workers, len(etas)
    basis = torch.eye(p + 1, dtype=torch.float64)  # row: whose value, column: which basis vector
    value = basis[:, :, None].expand(-1, -1, n).reshape(p + 1, -1).clone()
    curvature = etas.repeat(p + 1)
    center = Center([("x", value[p])])
    links: list[Link] = []
    for i in range(p):
        x = torch.nn.Parameter(torch.empty_like(value[i]))
        link = local(center, [("x", x)], f"w{i}")
        links.append(link)
        worker = EASGD(
            torch.optim.SGD([x], lr=1.0), link, moving_rate=alpha, period=1, unstable=True
        )
        with torch.no_grad():
            x.copy_(value[i])
        x.grad = curvature * x.detach()
        worker.step()
        value[i] = x.detach()
    value[p] = center.values
    return value.view(p + 1, p + 1, n).permute(2, 0, 1).numpy()


def radius(matrices: np.ndarray) -> np.ndarray:
    """Spectral radii."""
    return np.abs(np.linalg.eigvals(matrices)).max(-1)


def region(points: int = 40) -> Iterator[Row]:
    """The grid, of every number of workers; and what lies outside of it for one worker."""
    etas = torch.linspace(0, 2, points + 1, dtype=torch.float64)
    alphas = [k / points for k in range(points + 1)]
    # beyond the region too: for one worker nothing there is stable
    beyond = torch.linspace(0, 3, points + 1, dtype=torch.float64)
    for p in WORKERS:
        worst, count = 0.0, 0
        for alpha in alphas:
            inside = torch.tensor([stable(float(eta), alpha) for eta in etas])
            found = radius(maps(p, etas, alpha))[inside.numpy()]
            count += found.size
            worst = max(worst, float(found.max(initial=0.0)))
        bar = f"<= {BELOW!r}"
        note = f"{count} points"
        yield Row("region", f"p={p}", "largest radius inside", worst, None, 1.0, bar,
                  worst <= BELOW, note=note)  # fmt: skip
    outside, calm = 0, 0
    for alpha in [k / points for k in range(1, 2 * points)]:
        out = torch.tensor([not stable(float(eta), alpha) for eta in beyond]).numpy()
        found = radius(maps(1, beyond, alpha))[out]
        outside, calm = outside + found.size, calm + int((found < 1 - 1e-9).sum())
    yield Row("region", "p=1", "stable points outside", calm, None, 0, "<= 0", calm == 0,
              note=f"{outside} points")  # fmt: skip
    theirs, ours = (
        float(radius(admm(3, 0.001, 2.5))),
        float(radius(maps(3, torch.tensor([0.001], dtype=torch.float64), 0.0025))[0]),
    )
    yield Row("region", "p=3", "ADMM, eta=.001, rho=2.5", theirs, None, 1.00097, "> 1", theirs > 1)
    yield Row("region", "p=3", "EASGD, eta=.001, alpha=.0025", ours, None, 0.99927, "<= 1",
              ours <= 1)  # fmt: skip


def admm(workers: int, eta: float, rho: float) -> np.ndarray:
    """The map of one round-robin pass of linearised ADMM on (lambda_i, x_i, xc)."""
    p, size = workers, 2 * workers + 1
    total = np.eye(size)
    for i in range(p):
        dual, x, c = np.eye(size)[i], np.eye(size)[p + i], np.eye(size)[2 * p]
        step = np.eye(size)
        step[i] = dual - (x - c)
        step[p + i] = (x - eta * x + eta * rho * (step[i] + c)) / (1 + eta * rho)
        step[2 * p] = sum(
            (step[p + j] if j == i else np.eye(size)[p + j])
            - (step[j] if j == i else np.eye(size)[j])
            for j in range(p)
        ) / p  # fmt: skip
        total = step @ total
    return total


def synchronous(workers: int, eta: float, alpha: float) -> np.ndarray:
    """The map of one synchronous step, (p + 1, p + 1), last the centre; ranks are threads."""
    p = workers
    basis = torch.eye(p + 1, dtype=torch.float64)

    def one_rank(transport: Transport) -> tuple[torch.Tensor, torch.Tensor]:
        communicator = Communicator(transport, "fp32")
        center = Gathered([("x", basis[p])], communicator)
        x = torch.nn.Parameter(basis[p].clone())
        worker = EASGD(
            torch.optim.SGD([x], lr=eta), center, moving_rate=alpha, period=1, unstable=True
        )
        with torch.no_grad():
            x.copy_(basis[transport.rank])
        x.grad = x.detach().clone()
        worker.step()
        communicator.close()
        return x.detach(), center.copy

    found = run_ranks(p, one_rank)
    return torch.stack([*(x for x, _ in found), found[0][1]]).numpy()


def closed_form(p: int, eta: float, beta: float, t: int) -> float:
    """The centre's variance after t steps from a common start; h = sigma = 1."""
    alpha = beta / p
    a, c2 = eta + (p + 1) * alpha, eta * p * alpha
    root = math.sqrt(a * a - 4 * c2)
    g, f = 1 - (a - root) / 2, 1 - (a + root) / 2
    inner = (
        (g**2 - g ** (2 * t)) / (1 - g**2)
        + (f**2 - f ** (2 * t)) / (1 - f**2)
        - 2 * (g * f - (g * f) ** t) / (1 - g * f)
    )
    return (p * alpha * eta) ** 2 / (g - f) ** 2 * inner / p


def variance(steps: Sequence[int] = (2, 10, 100, 2000)) -> Iterator[Row]:
    """The covariance recursion of the shipped map against the closed form."""
    for p, eta, beta, published in VARIANCES:
        matrix = synchronous(p, eta, beta / p)
        noise = np.diag([eta**2] * p + [0.0])
        covariance, worst = np.zeros_like(noise), 0.0
        for t in range(1, max(steps) + 1):
            covariance = matrix @ covariance @ matrix.T + noise
            if t in steps:
                form = closed_form(p, eta, beta, t)
                worst = max(worst, abs(float(covariance[p, p]) / form - 1))
        value = float(covariance[p, p])
        what = f"eta h={eta:g}, beta={beta:g}"
        yield Row("variance", f"p={p}", what, value, worst, published, "<= 1e-06",
                  worst <= 1e-6 and abs(value / (published or value) - 1) < 1e-6)  # fmt: skip


def momentum(steps: int = 200, delta: float = 0.9, eta: float = 0.1) -> Iterator[Row]:
    """One worker with rates -delta and 1 beside torch's SGD with momentum delta."""
    curvature = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    start = torch.linspace(-2, 3, 10, dtype=torch.float64)
    x, y = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    link = local(Center([("x", start)]), [("x", x)], "w0")
    ours = EASGD(
        torch.optim.SGD([x], lr=eta), link, moving_rate=-delta, center_rate=1.0, period=1,
        unstable=True,
    )  # fmt: skip
    theirs = torch.optim.SGD([y], lr=eta, momentum=delta)
    worst = 0.0
    for _ in range(steps):
        x.grad, y.grad = curvature * x.detach(), curvature * y.detach()
        ours.step()
        theirs.step()
        worst = max(worst, float((x - y).detach().abs().max()))
    yield Row("momentum", "p=1", f"largest difference, {steps} steps", worst, None, 8e-16,
              "<= 1e-12", worst <= 1e-12)  # fmt: skip


HEADERS = {
    "region": ("workers", "", "here", "published", ""),
    "variance": ("workers", "", "here", "published", "off the closed form"),
    "momentum": ("workers", "", "here", "published", ""),
}


def show(rows: Sequence[Row]) -> str:
    """The rows as tables, the published figures beside the measured ones."""
    texts = []
    for table, header in HEADERS.items():
        body = [
            [row.scheme, row.what, f"{row.value:.7g}", number(row.published),
             row.note or ("" if row.ratio is None else number(row.ratio)), row.bar, verdict(row)]
            for row in rows
            if row.table == table
        ]  # fmt: skip
        if body:
            texts.append(f"{table}\n" + tabulate(body, [*header, "bar", ""], disable_numparse=True))
    return "\n\n".join(texts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=40, help="of each side of the grid")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"append rows (to {RESULTS.name})"
    )
    args = parser.parse_args(argv)
    rows = [*region(args.points), *variance(), *momentum()]
    return conclude(rows, show(rows), args.json, "easgd_theory", argv)


if __name__ == "__main__":
    sys.exit(main())
