"""
Fine-grained manifold distillation (Hao et al., "Learning Efficient Vision Transformers via
Fine-Grained Manifold Distillation", NeurIPS 2022, arXiv 2107.01378): how tokens relate.

A stage outputs B * N tokens, N positions of B images. Scaled to length 1, as rows of F (B*N, C),
their cosines F F^T describe how they relate, in a table of (B*N)^2 numbers whatever C is. So
student and teacher are compared without a projection, and there is nothing to train:

    mean of (F_s F_s^T - F_t F_t^T)^2

The whole table is large. Three parts of it are used instead:

    patches    the positions of one image with each other         B tables of N x N
    samples    the images of the batch at one position            N tables of B x B
    random     K tokens drawn from all of them                    1 table of K x K

    L = CE + 4 * patches + 0.1 * samples + 0.2 * random
"""

import torch
import torch.nn.functional as F

from distill import Method, matched
from files import UserError
from model import to_tokens
from nets import full_precision
from parallel import gather


def gram_difference(a, b):
    """Mean squared difference of two Gram matrices: rows (..., n, Ca) and (..., n, Cb) -> (...).

        1/n^2 ||A A^T - B B^T||_F^2 = 1/n^2 (||A^T A||_F^2 + ||B^T B||_F^2 - 2 ||A^T B||_F^2)

    With more rows than channels the right side is computed, which has no n x n matrix. It is 0 for
    equal matrices up to rounding, of either sign. Its gradient has up to 60 times the left side's
    rounding error: 1 % at values of 1e-9.
    """
    n = a.shape[-2]
    with full_precision(a):
        # float32 at least; float64 stays
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        if n <= max(a.shape[-1], b.shape[-1]):
            return (a @ a.mT - b @ b.mT).square().mean((-2, -1))
        # (..., Ca, Ca), (..., Cb, Cb), (..., Ca, Cb)
        aa, bb, ab = (x.mT @ (y / n) for x, y in ((a, a), (b, b), (a, b)))
        return sum(w * g.square().sum((-2, -1)) for w, g in ((1, aa), (1, bb), (-2, ab)))


def cuts(s, t, rows):
    """Tokens (B, N, Cs), (B, N, Ct) -> three pairs of row matrices: patches, samples, random.

    The random rows, `rows` of them or all if fewer, are the same in student and teacher.
    With several processes the last two pairs are cut from the tokens of all.
    """
    own = s, t
    s, t = gather(s), gather(t)
    samples = s.transpose(0, 1), t.transpose(0, 1)
    random = s.flatten(0, 1), t.flatten(0, 1)
    if rows < len(random[0]):
        drawn = torch.randperm(len(random[0]), device=s.device)[:rows]
        random = tuple(x[drawn] for x in random)
    return own, samples, random  # (B, N, C), (N, B, C), (K, C)


class Manifold(Method):
    """Cosines between tokens of a stage, compared with the teacher's: patches, samples, random.

    manifold_stages: the stages (1 to 4) whose maps are compared, student's i with teacher's i; the
    mean over them is taken. The teacher's map is brought to the student's grid. (The authors pair
    eight blocks of image classifiers; for segmentation no choice has been published.)
    manifold_patch_weight, manifold_sample_weight, manifold_random_weight: 0 leaves a term out. The
    defaults are those of the published command. They belong to its code, which averages over the
    entries of a table; the paper sums over them (squared Frobenius norms), N^2, B^2 and K^2 times
    larger. manifold_rows: K.

    That command has no cross-entropy, but the teacher's soft labels at temperature 1. Here the
    cross-entropy stays, and `--method manifold+kd` adds the soft labels. For a single image
    `samples` is 0; of random crops it compares places that have nothing in common.
    """

    needs_head = False

    def __init__(
        self,
        student_channels,
        teacher_channels,
        manifold_stages=(4,),
        manifold_patch_weight=4.0,
        manifold_sample_weight=0.1,
        manifold_random_weight=0.2,
        manifold_rows=192,
    ):
        super().__init__()
        if len(set(manifold_stages)) < len(manifold_stages):
            raise UserError("--manifold-stages names one stage twice")
        self.weights = manifold_patch_weight, manifold_sample_weight, manifold_random_weight
        self.stages, self.rows = tuple(manifold_stages), manifold_rows

    def forward(self, student, teacher, images, labels):
        terms = {}
        for i in self.stages:
            s, t = matched(student.features[i - 1], teacher.features[i - 1])
            s, t = (F.normalize(to_tokens(x), dim=2) for x in (s, t))  # (B, N, C)
            names = ("patches", "samples", "random")
            for name, weight, pair in zip(names, self.weights, cuts(s, t, self.rows)):
                if weight:
                    mean = gram_difference(*pair).mean() / len(self.stages)
                    terms[name] = terms.get(name, 0) + weight * mean
        return terms


METHODS = {"manifold": Manifold}
