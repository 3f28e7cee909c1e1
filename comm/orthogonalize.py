"""Orthonormal bases of tall matrices, batched, without host synchronisation."""

import torch
from torch import Tensor


def cholesky_qr(p: Tensor, passes: int = 2) -> Tensor:
    """Orthonormalise the columns of `p [batch, m, r]` through the Cholesky factor of its Gram matrix.

        G = P^T P + 1e-12 tr(G)/r I = L L^T;  P <- P L^-T;  twice, in float64

    The Gram matrix squares the condition number: in float32 the factorisation breaks down on columns that are almost
    dependent, which gradients of low rank give; in float64 it holds for whatever float32 can tell apart. The second
    pass restores the orthogonality that the first loses. Columns that are dependent beyond that come out short rather
    than wrong, and a zero matrix gives zeros.

    Cost:
        Two products with an r x r matrix and two r x r factorisations per pass.

    Example:
        >>> q = cholesky_qr(torch.tensor([[[3.0, 3.0], [0.0, 4.0]]]))
        >>> torch.allclose(q.mT @ q, torch.eye(2), atol=1e-5)
        True

    Reference:
        Yamamoto, Nakatsukasa, Yanagisawa, Fukaya. Roundoff error analysis of the CholeskyQR2 algorithm. ETNA 2015;
        mixed precision: Yamazaki, Tomov, Dongarra. Mixed-precision Cholesky QR factorization. SISC 2015.
    """
    q = p.to(torch.float64)
    for _ in range(passes):
        gram = q.mT @ q
        shift = gram.diagonal(dim1=-2, dim2=-1).mean(-1) * 1e-12 + torch.finfo(q.dtype).tiny
        gram.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
        factor, _ = torch.linalg.cholesky_ex(gram)
        q = torch.linalg.solve_triangular(factor, q.mT, upper=False).mT
    return q.to(p.dtype)


def newton_schulz(p: Tensor, steps: int = 16) -> Tensor:
    """Bring the singular values of `p [batch, m, r]` towards one by the cubic Newton-Schulz iteration.

        X <- P / ||P||_F;  X <- 1.5 X - 0.5 X X^T X, `steps` times

    Matrix products only, so it suits accelerators. Singular values below about 1.5^-steps of the norm stay small.

    Example:
        >>> q = newton_schulz(torch.tensor([[[3.0, 3.0], [0.0, 4.0]]]))
        >>> torch.allclose(q.mT @ q, torch.eye(2), atol=1e-5)
        True

    Reference:
        Bjorck, Bowie. An iterative algorithm for computing the best estimate of an orthogonal matrix. SIAM J. Numer.
        Anal. 1971.
    """
    x: Tensor = p / (torch.linalg.matrix_norm(p, keepdim=True) + torch.finfo(p.dtype).tiny)
    for _ in range(steps):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x
