"""Who takes part, and with what weight: the same after a restart, and from public values alone."""

from hypothesis import given
from hypothesis import strategies as st

from server import selection
from shared.messages import JoinReply
from shared.run_config import Evaluation, RunConfig

NODES = st.lists(st.integers(1, 2**63), min_size=1, max_size=12, unique=True)


def config(seed=0, **federation):
    return RunConfig.model_validate(
        {
            "seed": seed,
            "model": {"name": "x"},
            "task": {"labels": ["a", "b"]},
            "training": {"rounds": 9, "sampling_rate": 0.1},
            "federation": federation,
        }
    )


def joined(nodes, records=lambda number: 100):
    return {
        node: JoinReply(f"site-{i:02}", "d", "record", records(i), 0.1, f"{i:032x}", 0, "0" * 64)
        for i, node in enumerate(nodes)
    }


def names(sites, nodes):
    return [sites[node].site for node in nodes]


def test_all_take_part_unless_a_number_is_set():
    sites = joined([5, 3, 9])
    assert names(sites, selection.select(config(), 1, sites)) == ["site-00", "site-01", "site-02"]
    assert len(selection.select(config(sites_per_round=7), 1, sites)) == 3


@given(nodes=NODES, others=st.randoms(use_true_random=False), number=st.integers(1, 9), wanted=st.integers(1, 12))
def test_a_draw_is_by_name_and_so_the_same_whatever_ids_the_nodes_have_after_a_restart(nodes, others, number, wanted):
    sites = joined(nodes)
    ids = [node ^ 1 << 63 for node in nodes]
    again = joined(ids)
    shuffled = list(again.items())
    others.shuffle(shuffled)
    settings = config(sites_per_round=wanted)
    drawn = names(sites, selection.select(settings, number, sites))
    assert drawn == names(again, selection.select(settings, number, dict(shuffled)))
    assert len(set(drawn)) == min(wanted, len(nodes))
    assert drawn == sorted(drawn)


def test_draws_change_with_the_round_and_the_seed_and_reach_everyone():
    sites = joined(range(1, 11))
    rounds = [tuple(selection.select(config(sites_per_round=3), n, sites)) for n in range(1, 60)]
    assert len(set(rounds)) > 30
    assert {node for drawn in rounds for node in drawn} == set(sites)
    other = [tuple(selection.select(config(1, sites_per_round=3), n, sites)) for n in range(1, 60)]
    assert other != rounds


def test_who_scores_a_round_is_another_draw_of_as_many_as_are_wanted():
    sites = joined(range(1, 11))
    settings = config(sites_per_round=3).model_copy(update={"evaluation": Evaluation(sites_per_round=3)})
    scoring = [tuple(selection.select_to_evaluate(settings, n, sites)) for n in range(1, 60)]
    assert {len(drawn) for drawn in scoring} == {3}
    assert {node for drawn in scoring for node in drawn} == set(sites)
    assert scoring != [tuple(selection.select(settings, n, sites)) for n in range(1, 60)]
    assert len(selection.select_to_evaluate(config(sites_per_round=3), 1, sites)) == 10


def test_weights_are_one_or_the_declared_size_over_the_largest():
    sites = joined([4, 5, 6], lambda number: [100, 400, 200][number])
    most = selection.largest(sites.values())
    weigh = lambda settings: {node: selection.weight(settings, site, most) for node, site in sites.items()}  # noqa: E731
    assert weigh(config()) == {4: 1.0, 5: 1.0, 6: 1.0}
    assert weigh(config(weighting="declared")) == {4: 0.25, 5: 1.0, 6: 0.5}


def test_a_site_that_joins_within_a_round_weighs_no_more_than_the_largest_at_its_start():
    largest, newcomer = joined([1, 2], records=lambda number: 100 * (number + 1)).values()
    assert selection.weight(config(weighting="declared"), newcomer, largest.records) == 1.0
