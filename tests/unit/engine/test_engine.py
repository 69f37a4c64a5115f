"""Small cases worked out by hand."""

import dataclasses

import numpy as np
import pytest

from kvsim.engine.settings import RunSettings, SettingsError
from kvsim.profiles import lookup
from kvsim.runner import run
from kvtraces import Chat, Poisson, generate

GIB = 2**30


@pytest.fixture
def serve(make_profile, make_log, make_settings):
    def serve(times, prompts, outputs=1, chains=None, profile=None, block=16, **settings):
        log = make_log(times, prompts, outputs, chains, block)
        return run(log, make_settings(make_profile(**(profile or {})), **settings))

    return serve


def ttft(result):
    return result.columns["ttft_s"]


def test_a_prompt_takes_its_prefill(serve):
    result = serve([0], [1000], profile={"base": 0.5, "linear": 1e-3})
    assert ttft(result) == pytest.approx([1.5])


def test_two_prompts_share_a_step_and_end_together(serve):
    result = serve([0, 0, 0], [100, 200, 300], profile={"base": 1.0, "linear": 1e-3})
    # The first is alone in its step: the others come after the scheduler has run.
    assert ttft(result) == pytest.approx([1.1, 2.6, 2.6])
    assert result.columns["queue_s"] == pytest.approx([0, 0, 0])  # their step is put together when the first begins
    apart = serve([0, 0, 0], [100, 200, 300], profile={"base": 1.0, "linear": 1e-3}, async_scheduling=False)
    assert ttft(apart) == pytest.approx([1.1, 2.6, 2.6])
    assert apart.columns["queue_s"] == pytest.approx([0, 1.1, 1.1])


def test_a_budget_splits_a_prompt_and_each_part_pays_for_the_step(serve):
    result = serve([0], [1000], profile={"base": 1.0, "linear": 1e-3}, max_num_batched_tokens=300)
    assert ttft(result) == pytest.approx([4 + 1.0])


def test_attention_behind_computed_tokens_is_paid(serve):
    whole = serve([0], [1000], profile={"linear": 0.0, "quadratic": 1e-6})
    parts = serve([0], [1000], profile={"linear": 0.0, "quadratic": 1e-6}, max_num_batched_tokens=250)
    assert ttft(whole) == pytest.approx([1.0])
    assert ttft(parts) == pytest.approx([1.0])  # n (n + 2 c) summed over the parts is the square of the whole


def test_short_prompts_in_a_step_do_not_pay_for_each_others_attention(serve):
    result = serve([0, 0, 0], [1, 1000, 1000], profile={"base": 1.0, "linear": 0.0, "quadratic": 1e-6})
    assert ttft(result)[1:] - ttft(result)[0] == pytest.approx([1.0 + 2.0] * 2)


def test_without_chunked_prefill_a_prompt_waits_for_a_step_to_itself(serve):
    profile = {"base": 1.0, "linear": 1e-3}
    result = serve([0, 0, 0], [10, 400, 400], profile=profile, max_num_batched_tokens=500, chunked_prefill=False)
    assert ttft(result) == pytest.approx([1.01, 2.41, 3.81])


def test_without_chunked_prefill_a_prompt_that_waits_takes_nothing_yet(serve):
    family = list(range(20))
    result = serve(
        [0, 100, 100, 100],
        [320, 10, 400, 480],
        chains=[family, [], list(range(100, 125)), [*family, *range(200, 210)]],
        profile={"linear": 1e-2, "rate": 1e3},
        l1_gb=None,
        l0_prefix_caching=False,
        max_num_batched_tokens=500,
        chunked_prefill=False,
        load="sync",
    )
    # The third leaves too little budget for what the hit leaves of the fourth: it is loaded in the step after.
    assert result.columns["loaded_tokens"].tolist() == [0, 0, 0, 320]
    assert ttft(result)[1:] == pytest.approx([0.1, 4.1, 4.1 + 0.32 + 1.6])


def test_decodes_share_their_steps(serve):
    result = serve([0, 0], [100, 100], [11, 5], profile={"linear": 1e-3, "decode": 0.1})
    finished = result.columns["finished_s"]
    # First prompt 0 .. 0.1. Second beside the first one's decode: 0.1 s and the extra token of the decode.
    second = 0.1 + 101 * 1e-3
    assert finished[1] == pytest.approx(second + 4 * 0.1)
    assert finished[0] == pytest.approx(second + 9 * 0.1)


def test_decode_steps_grow_with_the_context(serve):
    result = serve([0], [1024], [3073], profile={"linear": 1e-3, "decode": 1e-3, "decode_token": 1e-5})
    steps = sum(1e-3 + 1e-5 * (1024 + i) for i in range(1, 3073))
    assert result.columns["finished_s"][0] - 1.024 == pytest.approx(steps, rel=1e-3)


def test_a_request_that_comes_while_others_decode_waits_for_the_end_of_the_step(serve):
    profile = {"linear": 1e-3, "decode": 0.1}  # the first decodes from 0.1 in steps of 0.1
    result = serve([0, 1.05], [100, 100], [100, 1], profile=profile, async_scheduling=False)
    assert result.columns["queue_s"][1] == pytest.approx(0.05)
    assert ttft(result)[1] == pytest.approx(0.05 + 0.101)


def test_with_asynchronous_scheduling_it_waits_for_the_step_that_was_put_together_before_it_came(serve):
    profile = {"linear": 1e-3, "decode": 0.1}
    result = serve([0, 1.05], [100, 100], [100, 1], profile=profile)
    assert result.columns["queue_s"][1] == pytest.approx(0.05)
    assert ttft(result)[1] == pytest.approx(0.05 + 0.1 + 0.101)


def test_with_asynchronous_scheduling_nobody_waits_for_a_step_that_there_is_not(serve):
    # While the first prompt is computed nothing else could be put together: the second runs right behind it.
    result = serve([0, 0.05], [100, 100], [1, 1], profile={"linear": 1e-3, "decode": 0.1})
    assert result.columns["queue_s"][1] == pytest.approx(0.05)
    assert ttft(result)[1] == pytest.approx(0.05 + 0.1)


def test_with_asynchronous_scheduling_a_place_is_taken_a_step_after_it_is_free(serve):
    profile = {"linear": 1e-3, "decode": 0.1}
    times, prompts, outputs = [0, 0, 0.1], [100] * 3, [3, 9, 1]
    # Both are computed by 0.2; the first one's last token is at 0.4. With 0.5 the third takes its place.
    apart = serve(times, prompts, outputs, profile=profile, max_num_seqs=2, async_scheduling=False)
    result = serve(times, prompts, outputs, profile=profile, max_num_seqs=2)
    assert result.columns["queue_s"][2] == pytest.approx(apart.columns["queue_s"][2])
    assert ttft(result)[2] == pytest.approx(ttft(apart)[2] + 0.1)


def test_interrupted_decodes_lose_no_time(serve):
    times = [0, *np.linspace(0.31, 9, 40).tolist()]
    one = serve([0], [100], [200], profile={"linear": 0.0, "decode": 0.1})
    many = serve(times, [100] * 41, [200] + [1] * 40, profile={"linear": 0.0, "decode": 0.1})
    prompts = np.unique(many.columns["finished_s"][1:])
    extra = 0.1 * len(prompts)  # steps with a prompt in them take no time here, and give the first a token
    assert many.columns["finished_s"][0] == pytest.approx(one.columns["finished_s"][0] - extra, abs=0.11)


def test_no_more_requests_run_than_allowed(serve):
    result = serve([0, 0, 0], [100] * 3, [11] * 3, profile={"linear": 1e-3, "decode": 0.1}, max_num_seqs=2)
    start = result.columns["queue_s"]
    assert start[2] == pytest.approx(result.columns["finished_s"][:2].min())


def test_l0_hits_whole_blocks_but_leaves_a_token_to_compute(serve):
    chains = [[1, 2, 3], [1, 2, 3], [1, 2, 9]]
    result = serve([0, 1, 2], [48, 48, 50], chains=chains, profile={"linear": 1e-3})
    assert result.columns["l0_tokens"].tolist() == [0, 32, 32]
    assert ttft(result) == pytest.approx([0.048, 0.016, 0.018])


def test_l0_forgets_the_longest_unused_first(serve):
    # 9 blocks; partial ones are handed out again first. The third prompt takes two such and the first one's last two;
    # the fourth hits what is left of it and takes the second one's last two, of which the fifth hits the first.
    chains = [[1, 2, 3, 4], [11, 12, 13], [21, 22, 23], [1, 2, 3, 4], [11, 12, 13, 14]]
    result = serve(range(5), [65, 49, 49, 65, 65], chains=chains, l0_gb=9 * 16 / GIB)
    assert result.columns["l0_tokens"].tolist() == [0, 0, 0, 32, 16]


def test_longer_than_the_model_or_the_gpu_is_refused(serve):
    result = serve([0, 1, 2], [100, 200, 60], [1, 1, 60], max_model_len=150, l0_gb=112 / GIB)
    assert result.columns["refused"].tolist() == [False, True, True]
    assert np.isnan(ttft(result)[1:]).all()
    assert result.summary()["refused_requests"] == 2
    assert result.summary()["prompt_tokens"] == 100


def test_preemption_recomputes_and_everybody_ends(serve):
    # Two prompts of 4 blocks and outputs of 4 more do not fit into 12 blocks together.
    result = serve([0, 0.1], [64, 64], [64, 64], profile={"linear": 1e-3, "decode": 0.1}, l0_gb=12 * 16 / GIB)
    assert result.columns["preemptions"].tolist() == [0, 1]
    finished = result.columns["finished_s"]
    assert finished[1] > finished[0] > 0
    alone = serve([0], [64], [64], profile={"linear": 1e-3, "decode": 0.1}).columns["finished_s"][0]
    # The second decodes beside the first until there is no room, waits for its end, computes again what it had.
    assert finished[0] == pytest.approx(alone + 0.065 - 0.1, abs=0.1)
    assert result.summary()["ttft_s"]["p99"] < 0.3  # its first token it had before


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        # 640 tokens of 1 ms each from L1 at 1 byte a ms, 64 new ones of 10 ms.
        ("sync", 0.640 + 0.640),
        ("async", 0.640 + 0.640),
        ("layerwise", 0.640 + 0.064),
        ("auto", 0.640 + 0.064),
    ],
)
def test_loads_overlap_with_compute_only_layer_by_layer(serve, load, expected):
    chains = [list(range(40)), [*range(40), 100, 101, 102, 103]]
    result = serve(
        [0, 100],
        [640, 704],
        chains=chains,
        profile={"linear": 1e-2, "rate": 1e3},
        l1_gb=None,
        l0_prefix_caching=False,
        load=load,
    )
    assert result.columns["matched_l1"].tolist() == [0, 640]
    assert result.columns["loaded_tokens"].tolist() == [0, 640]
    assert ttft(result)[1] == pytest.approx(expected)
    assert result.columns["load_s"][1] == pytest.approx(expected - 0.640)
    assert result.columns["prefill_s"][1] == pytest.approx(0.640)


@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize(
    ("load", "last_step"),
    # The prompt's last 220 tokens alone, or with the hit's 16 new ones and its 640 ms of loading.
    [("auto", 2.20), ("async", 2.20), ("layerwise", 2.36 + 0.064), ("sync", 2.36 + 0.640)],
)
def test_a_hit_that_comes_while_a_prompt_is_computed_is_loaded_beside_it(serve, load, last_step, async_scheduling):
    family = list(range(40))
    result = serve(
        [0, 100, 105],
        [640, 3100, 656],
        chains=[family, list(range(1000, 1193)), [*family, 100]],
        profile={"linear": 1e-2, "rate": 1e3},
        l1_gb=None,
        l0_prefix_caching=False,
        max_num_batched_tokens=320,
        async_scheduling=async_scheduling,
        load=load,
    )
    assert result.columns["loaded_tokens"].tolist() == [0, 0, 640]
    assert ttft(result)[1] == pytest.approx(9 * 3.20 + last_step)


def test_packed_kv_takes_less_of_the_bus_and_of_l1_and_not_of_the_gpu(serve):
    chains = [list(range(40)), [*range(40), 100]]
    given = {"profile": {"linear": 1e-2, "rate": 1e3}, "load": "sync", "l0_prefix_caching": False}
    result = serve([0, 100], [640, 656], chains=chains, l1_gb=320.5 / GIB, packed_share=0.5, l0_gb=672.5 / GIB, **given)
    assert result.columns["matched_l1"].tolist() == [0, 640]
    assert result.columns["load_s"][1] == pytest.approx(0.320)


def test_chunks_can_be_matched_when_they_are_stored_and_not_before(serve):
    chains = [[1, 2, 3, 4]] * 3
    # Computed at 0.64 s; 64 bytes at 100 bytes/s are stored at 1.28 s.
    profile = {"linear": 1e-2, "rate": 100.0}
    result = serve([0, 1.27, 1.29], [65] * 3, chains=chains, profile=profile, l1_gb=None, l0_prefix_caching=False)
    assert result.columns["matched_l1"].tolist() == [0, 0, 64]


def test_only_what_l0_lacks_is_loaded(serve):
    chains = [[1, 2, 3, 4], [11, 12, 13], [1, 2, 3, 4]]
    result = serve([0, 10, 20], [65, 49, 65], chains=chains, l1_gb=None, l0_gb=6 * 16 / GIB)
    columns = result.columns
    assert columns["matched_l1"].tolist() == [0, 0, 64]
    assert columns["l0_tokens"].tolist()[2] + columns["loaded_tokens"].tolist()[2] == 64
    assert 0 < columns["l0_tokens"][2] < 64


def test_l2_is_read_before_l1_and_takes_its_time(serve):
    chains = [[1, 2], [3, 4], [1, 2]]
    result = serve(
        [0, 10, 20],
        [33] * 3,
        chains=chains,
        profile={"linear": 1e-3, "rate": 1e3, "disk": 100.0},
        l1_gb=32 / GIB,
        l2_gb=None,
        l0_prefix_caching=False,
        load="sync",
    )
    columns = result.columns
    assert columns["matched_l2"].tolist() == [0, 0, 32]
    assert columns["loaded_tokens"].tolist() == [0, 0, 32]
    assert columns["load_s"][2] == pytest.approx(0.32 + 0.032)
    assert ttft(result)[2] == pytest.approx(0.32 + 0.032 + 0.001)
    assert result.copied_bytes["l2_read"] == 32


def behind_l2(serve, shared, times, others=(), **settings):
    """Serve prompts of 160 tokens that are in L2 alone by then, chunks of `shared`, at `times`, and other prompts."""
    flood = [list(range(1000 + 20 * i, 1010 + 20 * i)) for i in range(10)]
    families = [list(range(100 * family, 100 * family + 10)) for family in sorted(set(shared))]
    rows = [(10.0 * i, 160, chain) for i, chain in enumerate((*families, *flood))]
    rows += [
        (at, 160 + 64, families[family] + list(range(5000 + 8 * i, 5004 + 8 * i)))
        for i, (at, family) in enumerate(zip(times, shared, strict=True))
    ]
    rows += [(at, prompt, list(range(9000, 9000 + prompt // 16))) for at, prompt in others]
    rows.sort(key=lambda row: row[0])
    result = serve(
        [row[0] for row in rows],
        [row[1] for row in rows],
        chains=[row[2] for row in rows],
        profile={"linear": 1e-3, "disk": 160.0},
        l1_gb=400 / GIB,
        l2_gb=None,
        l0_prefix_caching=False,
        load="sync",
        **settings,
    )
    columns = result.columns
    waited = columns["matched_l2"] > 0
    assert waited.sum() == len(times)
    assert columns["loaded_tokens"][waited].tolist() == [160] * len(times)
    return (columns["arrived_s"] + columns["ttft_s"])[waited]


def test_requests_that_share_a_fetch_are_served_in_the_order_in_which_they_came(serve):
    # All wait for one read of a second; then 64 tokens of each are a step's budget.
    times = [500 + 1e-3 * i for i in range(6)]
    served = behind_l2(serve, [0] * 6, times, max_num_batched_tokens=64, async_scheduling=False)
    assert served == pytest.approx([501 + 0.064 * (i + 1) for i in range(6)])


def test_requests_whose_fetches_end_at_the_same_time_share_a_step(serve):
    served = behind_l2(serve, [0] * 6, [500 + 1e-3 * i for i in range(6)], async_scheduling=False)
    assert served == pytest.approx([501 + 6 * 0.064] * 6)


def test_what_is_fetched_later_does_not_overtake_while_a_step_is_under_way(serve):
    # Both reads, of a second each, end within the third prompt's step of 3.2 s; each is alone in a step then.
    served = behind_l2(serve, [0, 1], [500.0, 500.001], [(500.002, 3200)], max_num_batched_tokens=3200, max_num_seqs=1)
    assert served[0] < served[1]


@pytest.mark.parametrize("seed", [5, 6])
def test_l0_and_what_is_loaded_are_no_more_than_was_found(seed):
    # The engine's own cache changes while a request waits for L2: what it has is what it has when the hit is taken.
    log = generate(Chat(requests=500, seed=seed, block_tokens=64, arrivals=Poisson(sessions_per_s=3.0)))
    profile = lookup("qwen3-8b", "h100")
    shared = {"profile": profile, "chunk_tokens": 256, "l2_gb": 20.0, "max_model_len": 16384}
    for sizes in ({"l0_gb": 3.0, "l1_gb": 1.0}, {"l0_gb": 2.6, "l1_gb": 0.5, "rate_scale": 2.0}):
        columns = run(log, RunSettings(**shared, **sizes), baseline=False).columns
        loaded = (columns["loaded_tokens"] > 0) & (columns["preemptions"] == 0)
        assert (columns["matched_l2"] > 0).sum() > 100
        found = columns["matched_l1"] + columns["matched_l2"]
        assert (columns["l0_tokens"] + columns["loaded_tokens"] <= found)[loaded].all()


def test_every_placement_ends_and_conserves(serve):
    rng = np.random.default_rng(3)
    chains = [[int(family) * 100 + i for i in range(int(length))] for family, length in rng.integers(1, 9, (200, 2))]
    for placement in ("write-through", "write-back"):
        result = serve(
            rng.uniform(0, 5, 200).cumsum(),
            [16 * len(chain) + 3 for chain in chains],
            5,
            chains,
            profile={"rate": 1e4, "disk": 1e3},
            l1_gb=200 / GIB,
            l2_gb=600 / GIB,
            placement=placement,
            load="async",
        )
        assert result.total("matched_l2") > 0
        assert (result.columns["finished_s"] > 0).all()


def test_a_log_of_lengths_alone_drives_load_but_has_no_cache(make_log, make_profile, make_settings):
    log = make_log([0, 1], [100, 100])
    bare = type(log)(
        block_tokens=None,
        timestamp_ms=log.timestamp_ms,
        input_tokens=log.input_tokens,
        output_tokens=log.output_tokens,
        starts=np.zeros(3, dtype=np.int64),
        blocks=np.zeros(0, dtype=np.int64),
    )
    settings = make_settings(make_profile(linear=1e-3))
    assert ttft(run(bare, settings)) == pytest.approx([0.1, 0.1])
    with pytest.raises(SettingsError, match="hash_ids"):
        run(bare, make_settings(make_profile(), l1_gb=1))


def with_outputs(log, chains):
    return dataclasses.replace(
        log,
        output_starts=np.cumsum([0, *map(len, chains)]).astype(np.int64),
        output_blocks=np.array([name for chain in chains for name in chain], dtype=np.int64),
    )


@pytest.mark.parametrize("store_output", [False, True])
def test_the_next_turn_hits_the_output_before_it(make_log, make_profile, make_settings, store_output):
    # A prompt of 2 blocks and 10 tokens, an output of 60: the KV of 101 tokens is there, blocks 3 to 6 are of both.
    log = make_log([0, 100], [42, 120], [60, 1], chains=[[1, 2], [1, 2, 3, 4, 5, 6, 7]])
    log = with_outputs(log, [[3, 4, 5, 6], []])
    settings = make_settings(
        make_profile(linear=1e-3, decode=1e-2), chunk_tokens=16, l1_gb=None, store_output=store_output
    )
    columns = run(log, settings, baseline=False).columns
    assert columns["l0_tokens"].tolist() == [0, 16 * 6]
    assert columns["matched_l1"].tolist() == [0, 16 * (6 if store_output else 2)]


def test_storing_outputs_needs_their_hashes(serve):
    with pytest.raises(SettingsError, match="output_hash_ids"):
        serve([0], [100], l1_gb=None, store_output=True)
