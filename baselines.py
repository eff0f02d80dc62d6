"""
Distillation methods of other papers, behind the interface of distill.py: nn.Modules built from the
channels of student and teacher, called as `method(student, teacher, images, labels)`.
"""

import torch.nn.functional as F
from torch import nn

from model import resize


class PixelKD(nn.Module):
    """Soft-label distillation of every pixel (Hinton et al., arXiv 1503.02531, for dense outputs).

    T^2 * KL(softmax(teacher / T) || softmax(student / T)) over the classes, averaged over the
    pixels of the stride-4 logits. No label is used, so pixels without one teach as well.
    """

    needs_teacher = needs_logits = True

    def __init__(self, student_channels, teacher_channels, kd_weight=1.0, temperature=1.0):
        super().__init__()
        self.weight, self.T = kd_weight, temperature

    def forward(self, student, teacher, images, labels):
        s = student.logits.float()  # (B, K, h, w)
        t = resize(teacher.logits.float(), s.shape[2:])
        log_s, log_t = (F.log_softmax(z / self.T, dim=1) for z in (s, t))
        kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=1)  # (B, h, w)
        return {"kd": self.weight * self.T**2 * kl.mean()}


METHODS = {"kd": PixelKD}
