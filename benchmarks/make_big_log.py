"""Write a log of a million requests: interleaved copies of a Mooncake log, each with ids of its own.

    python benchmarks/make_big_log.py SOURCE OUT [--copies 83]

Copy k's ids are shifted by k times the largest id of the source plus one; row i of every copy comes before row i + 1
of any, at the same time as in the source.
"""

import argparse
from pathlib import Path

import msgspec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a Mooncake log, plain JSONL")
    parser.add_argument("out", type=Path)
    parser.add_argument("--copies", type=int, default=83)
    arguments = parser.parse_args()
    rows = [msgspec.json.decode(line) for line in arguments.source.read_bytes().splitlines()]
    stride = 1 + max(max(row["hash_ids"], default=0) for row in rows)
    with arguments.out.open("wb") as out:
        for row in rows:
            head = msgspec.json.encode({name: value for name, value in row.items() if name != "hash_ids"})[:-1]
            for copy in range(arguments.copies):
                ids = ", ".join([str(one + copy * stride) for one in row["hash_ids"]])
                out.write(b'%s, "hash_ids": [%s]}\n' % (head, ids.encode()))


if __name__ == "__main__":
    main()
