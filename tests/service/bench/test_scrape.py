from service.bench.scrape import Sample, Scrape, between


def observed(stage: str, total_s: float, count: float) -> dict[Sample, float]:
    labels = (("stage", stage),)
    name = "medley_stage_duration_seconds"
    return {(f"{name}_sum", labels): total_s, (f"{name}_count", labels): count}


def scraped(*samples: dict[Sample, float]) -> Scrape:
    return Scrape({key: value for some in samples for key, value in some.items()})


def test_a_mean_is_of_what_came_in_between() -> None:
    before = scraped(observed("decode", 10.0, 100))
    after = scraped(observed("decode", 10.6, 102), observed("queue", 3.0, 2))
    found = between(before, after)
    assert round(found["decode_s"], 9) == 0.3
    assert found["queue_s"] == 1.5


def test_what_was_not_observed_is_absent() -> None:
    same = scraped(observed("decode", 10.0, 100))
    assert between(same, same) == {}
