"""`medley bench kernels | model | ddas | swap | speed`: how fast, beside what, on what machine."""
