"""Operations on tensors, each a plain PyTorch definition that a Triton kernel may take over.

Nothing here knows of tasks, bundles or HTTP; torch (and triton) is all it imports, but for the
command `tune.py`, which is no part of serving.
"""
