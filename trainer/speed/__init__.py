"""`medley bench kernels | model | ddas | swap | speed`: how fast, against what, on which machine."""
