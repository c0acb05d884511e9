"""Which frozen features tell tasks apart, and refuse what no task has learnt?

Autoencoders for the nine tasks of the small suite on every feature that the backbone offers: how
many test images reach their own task, how many it refuses, how many another task accepts when
their own is absent, and how many pictures of no task at all are accepted. Per image, never per
batch. ``python -m trainer.experiments.routing`` writes ``docs/benchmarks/*_routing-features.*``;
`docs/adr/0006-ddas-features.md` draws the conclusion.
"""
