"""A made-up record of three tasks, with numbers that are easy to check by hand."""

from trainer.bench.record import Cost, Record, Routing, Row, Scores

ORDER = ("cold", "warm", "grey")
ZERO_SHOT = (0.4, 0.3, 0.2)
LEARNT = (0.9, 0.8, 0.7)


def record(*, seed: int = 0, gain: float = 0.0, suite: str = "small") -> Record:
    """One seed; `gain` is added to what moe_adapter answers of tasks that it learnt."""
    best = tuple(share + gain for share in LEARNT)
    steps = ((best[0], *ZERO_SHOT[1:]), (*best[:2], ZERO_SHOT[2]), best)
    return Record(
        suite=suite,
        order=ORDER,
        backbone="medley-mini",
        seed=seed,
        shots=None,
        rows=(
            Row(
                method="zero-shot", router="none", protocol="agnostic", accuracy_TT=(ZERO_SHOT,) * 3
            ),
            Row(
                method="finetune",
                router="none",
                protocol="agnostic",
                accuracy_TT=((0.9, 0.1, 0.1), (0.5, 0.9, 0.1), (0.4, 0.4, 0.9)),
            ),
            Row(method="moe_adapter", router="told", protocol="told", accuracy_TT=steps),
            Row(
                method="moe_adapter",
                router="ddas",
                protocol="agnostic",
                accuracy_TT=tuple(tuple(share - 0.02 for share in line) for line in steps),
            ),
        ),
        routings=(
            Routing(
                router="ddas",
                counts=((8, 1, 0, 1), (0, 9, 0, 1), (0, 0, 10, 0)),
                auroc=0.875,
                false_reject=(0.1, 0.1, 0.0),
                alpha=0.05,
                false_accept=(0.2, 0.0, 0.1),
            ),
        ),
        scores=(
            Scores(task="cold", threshold=1.5, own=(1.0, 1.2), others=(2.0, 3.0), unseen=(4.0,)),
        ),
        costs=tuple(
            Cost(
                method=method,
                task=task,
                trained_parameters=trained,
                stored_parameters=trained // 2,
                active_parameters=trained // 4,
                seconds=10.0 * (index + 1),
                cpu_seconds=20.0,
                peak_memory_bytes=500_000_000,
            )
            for method, trained in (("moe_adapter", 400_000), ("finetune", 8_000_000))
            for index, task in enumerate(ORDER)
        ),
        settings={"iterations": 600, "moe_adapter": {"lr": 0.005}},
        machine="2 cores",
        images={"cold": (100, 10), "warm": (110, 10), "grey": (120, 10)},
        command="medley bench mtil --suite small",
    )
