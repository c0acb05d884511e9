from functools import partial

import torch

from trainer.speed.timing import Pass, in_turns, over

CPU = torch.device("cpu")


def test_all_columns_are_called_in_every_round_and_a_failure_stays_with_its_column() -> None:
    called: list[str] = []

    def broken() -> None:
        raise ValueError("no such kernel\nand much more")

    works = {name: Pass(partial(called.append, name)) for name in ("a", "b")}
    timed = in_turns({**works, "broken": Pass(broken)}, device=CPU, repeats=6)
    assert timed["broken"].failure == "ValueError: no such kernel"
    assert timed["broken"].times_s == ()
    assert [len(timed[name].times_s) for name in ("a", "b")] == [6, 6]
    assert timed["a"].failure is None


def test_columns_change_their_places_between_rounds() -> None:
    called: list[str] = []
    slow = torch.randn(400, 400)  # longer than a sample: called once a round

    def work(name: str) -> None:
        called.append(name)
        slow @ slow @ slow @ slow @ slow @ slow @ slow @ slow

    in_turns({n: Pass(partial(work, n)) for n in "abc"}, device=CPU, repeats=20)
    first = called[6:]  # after the warm-up, twice each
    runs = ["".join(dict.fromkeys(first[i : i + 3])) for i in range(0, len(first), 3)]
    assert len(set(runs)) > 1


def test_a_time_is_that_of_one_input() -> None:
    many = 10**9  # so many that no busy machine hides it
    timed = in_turns({"one": Pass(int), "many": Pass(int, many)}, device=CPU, repeats=3)
    assert max(timed["many"].times_s) * 1000 < min(timed["one"].times_s)


def test_a_pass_goes_over_all_inputs() -> None:
    called: list[str] = []
    passed = over([partial(called.append, name) for name in "abc"])
    passed.run()
    assert (called, passed.inputs) == (["a", "b", "c"], 3)
