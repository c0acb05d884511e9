"""Operations on tensors: each a plain PyTorch definition, later with a Triton kernel of the same name and signature.

Nothing here knows of tasks, bundles or HTTP; torch (and triton) is all it imports.
"""
