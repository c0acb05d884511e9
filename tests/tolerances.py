"""How far a result may be from float64, as a relative Frobenius error, and why.

Half precisions go by `eps`, the distance from 1 to the next number: an operation that rounds errs
by at most eps / 2 of its result, one that cuts off (Triton's interpreter, to bfloat16) by at most
eps.
"""

import torch

_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}

# float32: a running sum of n terms drifts like a random walk, sqrt(n) * eps / 2 of what is summed:
# 1.9e-6 for the 1,024 columns of the widest tower. Sums here are in blocks, so less.
_FLOAT32 = 2e-6

# A kernel adds up in float32 and rounds twice: the hidden units, and the answer. Cut off, each errs
# by eps / 2 on average and always towards zero, so the two add up to eps.
FUSED = {torch.float32: _FLOAT32, **_EPS}

# The plain definition rounds the biases, the hidden units, the gates, their product, the answer and
# two sums with it: seven times eps / 2 at the most.
PLAIN = {torch.float32: _FLOAT32, **{dtype: 3.5 * eps for dtype, eps in _EPS.items()}}

# An autoencoder's error, of itself: a mean of squares, so nothing cancels, of numbers that are sums
# of up to 1,024 terms in steps, each sum off by a few eps / 2.
SCORED = 2e-6
# On tensor cores a sum takes a step for every 8 of its terms, thrice ("tf32x3"), and each cuts off
# what float32 cannot hold: at most 288 times eps / 2 of the largest part of a sum of 768.
SCORED_ON_TENSOR_CORES = 3e-5
