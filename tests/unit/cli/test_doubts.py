"""What every command says of a log that is doubtful, and what of it is in its JSON."""

import json

import pytest

COSTS = ("--model", "qwen3-8b", "--gpu", "h100")
COMMANDS = {
    "describe": (),
    "simulate": ("--chunk-tokens", 16),
    "run": (*COSTS, "--l1-size-gb", 1),
    "tune": (*COSTS, "--l1-points", 2, "--policies", "lru"),
    "tune simulated": (*COSTS, "--l1-points", 2, "--policies", "lru", "--simulate", 1),
    "validate": (*COSTS, "--l1-size-gb", 1),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(time_ms, *ids):
    lengths = {"input_length": 16 * len(ids), "output_length": 1}
    return {"timestamp": time_ms, **lengths, "hash_ids": ids, "block_size": 16, "ttft_ms": 9.0}


@pytest.mark.parametrize("name", COMMANDS)
def test_ids_that_do_not_chain_are_told_by_every_command(kvsim_command, tmp_path, name):
    rows = [row(1000 * i, 1, *((2, 3) if i % 2 else (3, 2)), 100 + i) for i in range(100)]
    path = write(tmp_path / "log.jsonl", rows)
    code, out, err = kvsim_command(name.split()[0], "--trace", path, *COMMANDS[name], "--json")
    assert code == 0
    (told,) = err.splitlines()
    assert told.startswith("kvsim: warning: hash_ids must stand for the whole prompt up to their block")
    assert f"block 2 follows block 3 in {path}:1 and follows block 1 in {path}:2" in told
    found = json.loads(out)
    said = {"tune": found.get("recommendation", {}).get("notes"), "validate": found.get("notes")}
    assert said.get(name.split()[0], found.get("warnings")).count(told.removeprefix("kvsim: warning: ")) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_a_block_twice_in_a_row_is_refused_by_every_command(kvsim_command, tmp_path, name):
    path = write(tmp_path / "log.jsonl", [row(0, 1, 2), row(1, 1, 2, 1)])
    error = kvsim_command.refused(name.split()[0], "--trace", path, *COMMANDS[name])
    assert f"{path}:2: hash_ids: names block 1 twice" in error


@pytest.mark.parametrize("name", COMMANDS)
def test_a_log_in_order_of_completion_is_sorted_by_every_command(kvsim_command, tmp_path, name):
    path = write(tmp_path / "log.jsonl", [row(1000 * (i ^ 1), 1, 2, 100 + i) for i in range(100)])
    command = (name.split()[0], "--trace", path, *COMMANDS[name])
    assert "sort the rows (--sort)" in kvsim_command.refused(*command)
    code, _, err = kvsim_command(*command, "--sort")
    assert (code, err) == (0, "kvsim: warning: sorted by timestamp: 50 rows of 100 came after a later one\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_coarse_times_are_told_where_ttft_is_simulated(kvsim_command, tmp_path, name):
    path = write(tmp_path / "log.jsonl", [row(3000 * (i // 5), 1, 2, 100 + i) for i in range(100)])
    command = (name.split()[0], "--trace", path, *COMMANDS[name])
    told = name in ("run", "tune simulated")
    assert ("in steps of 3 s" in kvsim_command.shown(*command, "--json")) == told
    if told:
        spread = kvsim_command.shown(*command, "--arrivals", "spread", "--json")
        assert "in steps of" not in spread
        assert json.loads(spread) != json.loads(kvsim_command.shown(*command, "--json"))


def test_spreading_asks_tune_for_a_simulation(kvsim_command, tmp_path):
    path = write(tmp_path / "log.jsonl", [row(3000 * (i // 5), 1, 2, 100 + i) for i in range(100)])
    command = ("tune", "--trace", path, *COMMANDS["tune"])
    assert kvsim_command.json(*command, "--arrivals", "spread") == kvsim_command.json(
        *command, "--arrivals", "spread", "--simulate", 8
    )
